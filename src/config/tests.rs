use super::*;

fn inputs(environment: &[(&str, &str)]) -> Inputs {
    let mut inputs = Inputs {
        // No file of this machine has a say.
        host_file: Some(PathBuf::from("/nowhere/config.toml")),
        login: Some("login".into()),
        ..Inputs::default()
    };
    inputs.environment.insert("HOME".into(), "/nowhere/home".into());
    for (name, value) in environment {
        inputs.environment.insert((*name).into(), (*value).into());
    }
    inputs
}

#[test]
fn the_stronger_layer_wins_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let user_file = dir.path().join("grid-mount/config.toml");
    std::fs::create_dir(user_file.parent().unwrap()).unwrap();
    std::fs::write(&user_file, "# mine\nuser = \"file\"\nconnections = 7\n").unwrap();
    let host_file = dir.path().join("host.toml");
    std::fs::write(
        &host_file,
        "user = \"host\"\nconnections = 9\ncache_size = \"1GiB\"\n",
    )
    .unwrap();

    let mut inputs = inputs(&[("XDG_CONFIG_HOME", dir.path().to_str().unwrap())]);
    inputs.host_file = Some(host_file.clone());
    let settings = Settings::load(&inputs).unwrap();
    assert_eq!(settings.user.value.as_str(), "file");
    assert_eq!(
        settings.user.source,
        Source::File {
            path: user_file,
            line: 2
        }
    );
    assert_eq!(settings.connections.value, 7);
    assert_eq!(
        settings.cache_size.source,
        Source::File {
            path: host_file,
            line: 3
        }
    );

    inputs
        .environment
        .insert("GRID_MOUNT_USER".into(), "environment".into());
    let settings = Settings::load(&inputs).unwrap();
    assert_eq!(settings.user.value.as_str(), "environment");
    inputs.flags.insert("user", "flag".into());
    let settings = Settings::load(&inputs).unwrap();
    assert_eq!(
        (settings.user.value.as_str(), settings.user.source),
        ("flag", Source::Flag("user"))
    );
}

#[test]
fn every_key_is_explained_and_can_be_set_in_each_layer() {
    let explained = Settings::load(&inputs(&[])).unwrap().explain();
    assert_eq!(explained.iter().map(|line| line.key).collect::<Vec<_>>(), KEYS);
    assert!(explained.iter().all(|line| line.source == "default"));
    for line in &explained {
        // A printed value parses again, from a flag and from the environment.
        let mut inputs = inputs(&[(&environment_name(line.key), &line.value)]);
        let again = Settings::load(&inputs).unwrap().explain();
        let again = again.iter().find(|other| other.key == line.key).unwrap();
        assert_eq!(
            (&again.value, again.source.starts_with("environment")),
            (&line.value, true)
        );
        inputs.flags.insert(line.key, line.value.clone());
        assert!(Settings::load(&inputs).is_ok());
    }
}

#[test]
fn mistakes_name_the_file_and_the_line() {
    for (text, line, word) in [
        ("\ncach_dir = \"/x\"\n", 2, "cache_dir"),
        ("user = \"a\"\n\nconnections = \"many\"\n", 3, "many"),
        ("user = \"a\"\nuser = \"b\"\n", 2, "duplicate"),
        ("cache_size = [1]\n", 1, "array"),
        ("what is this\n", 1, ""),
        ("zzzzqqqq = 1\n", 1, "there are catalog"),
        ("\n[agent]\norigin = []\n", 2, "agent.origin"),
        ("[agent]\norigins = [\"ftp://x\"]\n", 1, "agent.origins"),
        ("[agent]\nendpoints = [\"minio:9000\"]\n", 1, "https://host:port"),
        ("agent = 1\n", 1, "[agent]"),
        ("idle_timeout = \"soon\"\n", 1, "10m"),
        ("log_level = \"loud\"\n", 1, "debug"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let error = Settings::load(&Inputs {
            host_file: Some(path.clone()),
            ..inputs(&[])
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.starts_with(&format!("{}:{line}:", path.display())),
            "{error}"
        );
        assert!(error.contains(word), "{error}");
    }
    let error = Settings::load(&inputs(&[("GRID_MOUNT_CACHE_SIZE", "lots")]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("GRID_MOUNT_CACHE_SIZE") && error.contains("lots"),
        "{error}"
    );
}

#[test]
fn a_shared_agents_rules_come_from_the_hosts_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let host_file = dir.path().join("host.toml");
    let text = "user = \"x\"\n[agent]\ncatalogs = [\"s3://a/b\"]\norigins = [\"/srv\"]\ngroup = \"wheel\"\n";
    std::fs::write(&host_file, text).unwrap();
    let mut inputs = inputs(&[("XDG_CONFIG_HOME", dir.path().to_str().unwrap())]);
    inputs.host_file = Some(host_file);
    let shared = Settings::load(&inputs).unwrap().shared_agent;
    assert_eq!(shared.catalogs, ["s3://a/b".parse().unwrap()]);
    assert_eq!(shared.origins, ["file:///srv".parse().unwrap()]);
    assert_eq!(shared.group.as_deref(), Some("wheel"));
    std::fs::create_dir(dir.path().join("grid-mount")).unwrap();
    std::fs::write(dir.path().join("grid-mount/config.toml"), "[agent]\n").unwrap();
    let refused = Settings::load(&inputs).unwrap_err().to_string();
    assert!(
        refused.contains("config.toml:1:") && refused.contains("host"),
        "{refused}"
    );
}

#[test]
fn idle_times() {
    for (text, seconds) in [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86_400),
    ] {
        let time = text.parse::<IdleTimeout>().unwrap();
        assert_eq!(time.0, Some(Duration::from_secs(seconds)));
        assert_eq!(time.to_string().parse::<IdleTimeout>().unwrap(), time);
    }
    assert_eq!("never".parse(), Ok(IdleTimeout(None)));
    for bad in ["", "0", "m", "10 m", "1w", "-1s", "99999999999999999999", "400d"] {
        assert!(bad.parse::<IdleTimeout>().is_err(), "{bad}");
    }
}

#[test]
fn shares_of_a_disk() {
    assert_eq!("20%".parse::<DiskShare>().unwrap().of(1000), 200);
    assert_eq!("1KiB".parse::<DiskShare>().unwrap().of(1), 1024);
    assert_eq!(
        "100%".parse::<DiskShare>().unwrap().of(u64::MAX),
        u64::MAX / 100 * 100
    );
    assert!("101%".parse::<DiskShare>().is_err());
    assert!("-1%".parse::<DiskShare>().is_err());
}

#[test]
fn grids_address_is_the_catalog_where_nothing_else_is_named() {
    let grid = ("GRID_URL", "https://grid.example.org/team");
    let catalog = |environment: &[(&str, &str)]| Settings::load(&inputs(environment)).map(|all| all.catalog);
    let found = catalog(&[grid]).unwrap();
    assert_eq!(
        (
            found.value.to_string().as_str(),
            found.source.to_string().as_str()
        ),
        ("https://grid.example.org/team", "environment GRID_URL")
    );
    let named = catalog(&[grid, ("GRID_MOUNT_CATALOG", "s3://bucket/x")]).unwrap();
    assert_eq!(named.value.to_string(), "s3://bucket/x");
    for wrong in ["s3://bucket/x", "file:///x", "grid"] {
        let error = catalog(&[("GRID_URL", wrong)]).unwrap_err().to_string();
        assert!(error.contains("GRID_URL") && error.contains(wrong), "{error}");
    }
}

#[test]
fn the_memory_limit_follows_what_there_is() {
    let limit = |allowed, environment: &[(&str, &str)]| {
        let inputs = Inputs {
            memory_allowed: allowed,
            ..inputs(environment)
        };
        Settings::load(&inputs).unwrap().memory_limit.value.0 >> 20
    };
    assert_eq!(limit(None, &[]), 512);
    assert_eq!(limit(Some(64 << 30), &[]), 2048);
    assert_eq!(limit(Some(24 << 30), &[]), 1536);
    assert_eq!(limit(Some(4 << 30), &[]), 512);
    assert_eq!(limit(Some(1 << 30), &[]), 256);
    assert_eq!(limit(Some(1 << 20), &[]), 32);
    // Who says what he wants gets it.
    assert_eq!(
        limit(Some(1 << 30), &[("GRID_MOUNT_MEMORY_LIMIT", "700MiB")]),
        700
    );
}
