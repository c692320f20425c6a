use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<Reference, ParseError> {
    text.parse()
}

fn reference(owner: Option<&str>, datastore: &str, version: VersionSelector) -> Reference {
    Reference {
        owner: owner.map(|owner| owner.parse().unwrap()),
        datastore: datastore.parse().unwrap(),
        version,
    }
}

fn number(number: u64) -> VersionSelector {
    VersionSelector::Number(VersionNumber::new(number).unwrap())
}

#[test]
fn every_form_of_the_grammar_parses() {
    let prod = || VersionSelector::Alias("prod".parse().unwrap());
    for (text, expected) in [
        ("imagenet", reference(None, "imagenet", VersionSelector::Latest)),
        (
            "imagenet/latest",
            reference(None, "imagenet", VersionSelector::Latest),
        ),
        (
            "alice:imagenet",
            reference(Some("alice"), "imagenet", VersionSelector::Latest),
        ),
        (
            "alice:imagenet/3",
            reference(Some("alice"), "imagenet", number(3)),
        ),
        (
            "alice:imagenet/prod",
            reference(Some("alice"), "imagenet", prod()),
        ),
        (
            "alice:/datastores/imagenet/3",
            reference(Some("alice"), "imagenet", number(3)),
        ),
        (
            "alice:/datastores/imagenet",
            reference(Some("alice"), "imagenet", VersionSelector::Latest),
        ),
        ("/datastores/imagenet/prod", reference(None, "imagenet", prod())),
        ("datastores/3", reference(None, "datastores", number(3))),
        (
            "a.b+c@example.org:Image-Net_1.0/3",
            reference(Some("a.b+c@example.org"), "Image-Net_1.0", number(3)),
        ),
        (
            "a:1/18446744073709551615",
            reference(Some("a"), "1", number(u64::MAX)),
        ),
    ] {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn every_mistake_is_pointed_at_and_says_what_to_do() {
    let long = "x".repeat(MAX_NAME + 1);
    let (long_user, long_alias) = (format!("{long}:a"), format!("a/{long}"));
    for (text, column, says) in [
        ("", 1, "empty"),
        (":imagenet", 1, "leave the `:` out"),
        ("alice:", 7, "the datastore is empty"),
        ("alice:/3", 7, "/datastores/NAME"),
        ("/imagenet", 1, "/datastores/NAME"),
        ("/datastores/", 13, "the datastore is empty"),
        ("/datastores//3", 13, "the datastore is empty"),
        ("imagenet/", 10, "the version is missing"),
        ("imagenet/0", 10, "no version 0"),
        ("imagenet/000", 10, "no version 0"),
        ("imagenet/007", 10, "write 7"),
        ("imagenet/-3", 10, "no sign"),
        ("imagenet/3a", 11, "digits only"),
        ("imagenet/18446744073709551616", 10, "too large"),
        ("imagenet/3/4", 11, "one version"),
        ("imagenet/3/", 11, "leave the last `/` out"),
        ("alice/imagenet/3", 15, "did you mean alice:imagenet/3?"),
        ("alice:imagenet/3/train/1.jpg", 17, "not a path"),
        ("alice/imagenet:3", 6, "`:` after the user"),
        ("alice:imagenet:3", 15, "the version comes after a `/`"),
        ("s3://bucket/prefix", 3, "URL"),
        ("imagenet/Latest", 10, "write `latest`"),
        ("imagenet/_x", 10, "begins with a letter"),
        ("..", 1, "names are not paths"),
        ("alice:../etc", 7, "names are not paths"),
        ("imagenet/..", 10, "names are not paths"),
        (".hidden", 1, "begins with a letter or a digit"),
        ("-rf", 1, "begins with a letter or a digit"),
        ("alice bob:x", 6, "a space"),
        ("alice:a\u{7}b", 8, "control character \\u{7}"),
        ("a\0b", 2, "control character \\u{0}"),
        ("alice:größe", 9, "`ö`"),
        ("é:x", 1, "`é`"),
        (&long, MAX_NAME + 1, "too long"),
        (&long_user, MAX_NAME + 1, "too long"),
        (&long_alias, MAX_NAME + 3, "too long"),
    ] {
        let error = parse(text).expect_err(text);
        assert_eq!(error.column, column, "{text:?}: {error}");
        assert!(error.message.contains(says), "{text:?}: {error}");
        assert!(
            !error.to_string().contains(|c: char| c.is_control()),
            "{text:?}: {error}"
        );
    }
}

#[test]
fn latest_is_never_an_alias() {
    for text in ["latest", "LATEST", "Latest"] {
        assert!(text.parse::<AliasName>().is_err(), "{text}");
    }
    assert!("latest-good".parse::<AliasName>().is_ok());
    assert!("3".parse::<AliasName>().is_err());
}

#[test]
fn pinned_and_qualified_take_no_less_and_no_more() {
    assert_eq!(
        "alice:x/3".parse::<PinnedReference>().unwrap().to_string(),
        "alice:x/3"
    );
    assert_eq!("alice:x".parse::<QualifiedName>().unwrap().to_string(), "alice:x");
    assert_eq!(
        "alice:/datastores/x"
            .parse::<QualifiedName>()
            .unwrap()
            .to_string(),
        "alice:x"
    );
    for (text, column) in [
        ("x/3", 1),
        ("alice:x", 8),
        ("alice:x/latest", 15),
        ("alice:x/prod", 9),
    ] {
        assert_eq!(
            text.parse::<PinnedReference>().unwrap_err().column,
            column,
            "{text}"
        );
    }
    for (text, column) in [
        ("x", 1),
        ("alice:x/3", 8),
        ("alice:x/latest", 8),
        ("alice:latest/latest", 13),
    ] {
        assert_eq!(
            text.parse::<QualifiedName>().unwrap_err().column,
            column,
            "{text}"
        );
    }
}

#[test]
fn no_owner_means_me() {
    let me = "bob".parse().unwrap();
    assert_eq!(parse("x/3").unwrap().qualify(&me).to_string(), "bob:x");
    assert_eq!(parse("alice:x/3").unwrap().qualify(&me).to_string(), "alice:x");
}

#[test]
fn json_is_text_and_is_checked() {
    let pinned: PinnedReference = serde_json::from_str("\"alice:x/3\"").unwrap();
    assert_eq!(serde_json::to_string(&pinned).unwrap(), "\"alice:x/3\"");
    assert!(serde_json::from_str::<UserName>("\"../etc\"").is_err());
    assert!(serde_json::from_str::<DatastoreName>("\"\"").is_err());
    assert!(serde_json::from_str::<AliasName>("\"latest\"").is_err());
    assert!(serde_json::from_str::<VersionNumber>("0").is_err());
    assert_eq!(serde_json::from_str::<VersionNumber>("3").unwrap().get(), 3);
}

#[test]
fn near_misses_are_found_and_strangers_are_not() {
    let names = ["cifar-10", "imagenet", "imagenet-21k", "mnist"];
    for (typed, expected) in [
        ("ImageNet", Some("imagenet")),
        ("image_net", Some("imagenet")),
        ("CIFAR10", Some("cifar-10")),
        ("imagnet", Some("imagenet")),
        ("iamgenet", Some("imagenet")),
        ("minst", Some("mnist")),
        ("image", Some("imagenet")),
        ("imagenet", Some("imagenet-21k")),
        ("coco", None),
        ("x", None),
        ("", None),
    ] {
        assert_eq!(did_you_mean(typed, names), expected, "{typed}");
    }
    assert_eq!(did_you_mean("A", ["b", "a"]), Some("a"));
    assert_eq!(did_you_mean("ab", ["cd", "ac"]), None);
}

fn datastore() -> impl Strategy<Value = String> {
    "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
}

fn user() -> impl Strategy<Value = String> {
    "[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}"
}

fn selector() -> impl Strategy<Value = VersionSelector> {
    prop_oneof![
        Just(VersionSelector::Latest),
        (1..=u64::MAX).prop_map(number),
        "[A-Za-z][A-Za-z0-9._-]{0,127}"
            .prop_filter("not latest", |alias| !alias.eq_ignore_ascii_case("latest"))
            .prop_map(|alias| VersionSelector::Alias(alias.parse().unwrap())),
    ]
}

/// Texts near the grammar: mostly separators and the things that go wrong.
fn nearly() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("/datastores/".to_owned()),
        Just("latest".to_owned()),
        "[:/.0-9a-c@+ _-]{1,3}",
        "\\PC",
        any::<char>().prop_map(String::from),
        "[0-9]{1,22}",
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

/// Where the error points there is a character that belongs to the mistake, or the end.
fn check(text: &str) -> Result<(), TestCaseError> {
    match parse(text) {
        Ok(parsed) => {
            // What parses prints as something that parses to the same.
            prop_assert_eq!(parse(&parsed.to_string()), Ok(parsed));
        }
        Err(error) => {
            prop_assert!(
                (1..=text.chars().count() + 1).contains(&error.column),
                "{}",
                error
            );
            prop_assert_eq!(&error.text, text);
            prop_assert!(!error.message.is_empty());
        }
    }
    for error in [
        text.parse::<PinnedReference>().err(),
        text.parse::<QualifiedName>().err(),
    ]
    .into_iter()
    .flatten()
    {
        prop_assert!(
            (1..=text.chars().count() + 1).contains(&error.column),
            "{}",
            error
        );
    }
    Ok(())
}

proptest! {
    #[test]
    fn printing_and_parsing_is_the_identity(owner in proptest::option::of(user()), datastore in datastore(), version in selector()) {
        let printed = reference(owner.as_deref(), &datastore, version);
        prop_assert_eq!(parse(&printed.to_string()), Ok(printed.clone()));
        let long = match &printed.owner {
            Some(owner) => format!("{owner}:/datastores/{}/{}", printed.datastore, printed.version),
            None => format!("/datastores/{}/{}", printed.datastore, printed.version),
        };
        prop_assert_eq!(parse(&long), Ok(printed.clone()));
        let json = serde_json::to_string(&printed).unwrap();
        prop_assert_eq!(serde_json::from_str::<Reference>(&json).unwrap(), printed);
    }

    #[test]
    fn any_string_parses_or_points_at_a_column(text in any::<String>()) {
        check(&text)?;
    }

    #[test]
    fn nearly_a_reference_parses_or_points_at_a_column(text in nearly()) {
        check(&text)?;
    }

    #[test]
    fn another_case_is_always_suggested(name in datastore()) {
        let other = name.to_uppercase();
        prop_assume!(other != name);
        prop_assert_eq!(did_you_mean(&other, [name.as_str()]), Some(name.as_str()));
    }
}
