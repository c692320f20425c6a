//! A control plane in a process of its own, and people with tokens.

#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
};

use super::sandbox::Sandbox;

/// Whoever runs the control plane: the only one who knows the store's keys.
pub struct Administrator {
    pub sandbox: Sandbox,
    catalog: String,
}

/// One replica; ends with this.
pub struct Replica {
    child: Child,
    pub url: String,
}

impl Administrator {
    pub fn new(catalog: &str, settings: &[(&str, String)]) -> Self {
        let sandbox = settings
            .iter()
            .fold(Sandbox::new(), |sandbox, (name, value)| sandbox.env(name, value));
        Self {
            sandbox,
            catalog: catalog.to_owned(),
        }
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        let all: Vec<&str> = ["catalog", "--catalog", &self.catalog]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        self.sandbox.ok(&all)
    }

    /// A user with a token.
    pub fn person(&self, name: &str) -> String {
        self.ok(&["user", "add", name]);
        self.ok(&["token", "new", name]).trim().to_owned()
    }

    /// At `listen`, `127.0.0.1:0` for any free port.
    pub fn serve(&self, listen: &str, more: &[&str]) -> Replica {
        let mut command = self
            .sandbox
            .grid(&["catalog", "--catalog", &self.catalog, "serve"]);
        command.args(["--listen", listen]).args(more);
        let log = std::fs::File::create(self.sandbox.path("tmp/serve.log")).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut url)
            .unwrap();
        let said = std::fs::read_to_string(self.sandbox.path("tmp/serve.log")).unwrap();
        assert!(url.starts_with("http"), "it does not serve: {said}");
        Replica {
            child,
            url: url.trim().to_owned(),
        }
    }
}

impl Replica {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn address(&self) -> String {
        self.url.split_once("://").unwrap().1.to_owned()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Somebody with a token and nothing else.
pub fn somebody(replica: &Replica, token: &str) -> Sandbox {
    let somebody = Sandbox::new().env("GRID_MOUNT_CATALOG", &replica.url);
    let file = somebody.path("home/token");
    std::fs::write(&file, token).unwrap();
    somebody.env("GRID_MOUNT_TOKEN_FILE", file.to_str().unwrap())
}
