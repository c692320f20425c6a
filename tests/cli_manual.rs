//! Completions and manual pages: made from the grammar, and taken by the programs that they are for.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{fs, process::Command};

use sandbox::{Sandbox, skip, told};

fn there_is(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[test]
fn bash_completes_commands_and_options() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = sandbox.ok(&["completions", shell]);
        for word in ["publish", "unmount", "catalog"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
    let refused = sandbox.fails(2, &["completions", "tcsh"]);
    assert!(refused.contains("bash"), "{refused}");
    if !there_is("bash") {
        skip("completion in bash", "there is no bash");
        return;
    }
    fs::write(sandbox.path("script"), sandbox.ok(&["completions", "bash"])).unwrap();
    // As bash asks: the words so far, and the one the cursor is in.
    let ask = |words: &[&str]| {
        let last = words.len() - 1;
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let asked = format!(
            ". ./script; f=$(complete -p grid-mount); f=${{f##*-F }}; f=${{f%% *}}; \
             COMP_WORDS=({}); COMP_CWORD={last}; $f grid-mount '{}' '{}'; echo \"${{COMPREPLY[@]}}\"",
            quoted.join(" "),
            words[last],
            words[last - 1],
        );
        let output = sandbox
            .program("/bin/bash")
            .args(["--norc", "-c", &asked])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(ask(&["grid-mount", "publ"]).contains("publish"));
    assert!(ask(&["grid-mount", "unmount", "--la"]).contains("--lazy"));
}

#[test]
fn every_command_has_a_page() {
    let sandbox = Sandbox::new();
    let page = sandbox.ok(&["man"]);
    assert!(
        page.contains(".TH GRID\\-MOUNT") || page.contains(".TH GRID-MOUNT"),
        "{page}"
    );
    let dir = sandbox.path("man1");
    let listed = sandbox.ok(&["man", "--dir", dir.to_str().unwrap()]);
    let names: Vec<&str> = listed.lines().collect();
    for command in ["", "-mount", "-publish", "-cache", "-cache-evict", "-status"] {
        let page = dir.join(format!("grid-mount{command}.1"));
        assert!(names.contains(&page.to_str().unwrap()), "{listed}");
        let text = fs::read_to_string(&page).unwrap();
        assert!(
            text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"),
            "{text}"
        );
    }
    assert!(
        fs::read_to_string(dir.join("grid-mount-unmount.1"))
            .unwrap()
            .contains("lazy")
    );
    let in_the_way = sandbox.path("file");
    fs::write(&in_the_way, "").unwrap();
    let refused = sandbox.fails(1, &["man", "--dir", in_the_way.to_str().unwrap()]);
    assert!(refused.contains("file"), "{refused}");
}
