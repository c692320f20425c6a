//! The grammar of `grid-mount catalog …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::CatalogArgs;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  grid-mount catalog --catalog s3://bucket/prefix user add alice
  grid-mount catalog --catalog s3://bucket/prefix team add vision alice bob
  grid-mount catalog --catalog s3://bucket/prefix token new alice > alice.token
  grid-mount catalog --catalog s3://bucket/prefix serve --listen 0.0.0.0:8443 ...
Members then use --catalog https://HOST:8443 and GRID_MOUNT_TOKEN_FILE=alice.token.")]
pub struct CatalogAdminArgs {
    #[command(subcommand)]
    pub command: CatalogAdminCommand,
    /// Keep users, teams and tokens in this file, not in the store
    #[arg(long, value_name = "FILE")]
    pub users: Option<PathBuf>,
    #[command(flatten)]
    pub catalog: CatalogArgs,
}

#[derive(Debug, Subcommand)]
pub enum CatalogAdminCommand {
    /// Serve the catalog to those who have a token
    #[command(
        after_help = "Example:\n  grid-mount catalog --catalog s3://bucket/prefix serve --listen 127.0.0.1:8080"
    )]
    Serve(ServeArgs),
    /// Add, remove, list users
    #[command(after_help = "Example:\n  grid-mount catalog user add alice")]
    User {
        #[command(subcommand)]
        command: UserCommand,
    },
    /// Add to, remove from, list teams
    #[command(after_help = "Example:\n  grid-mount catalog team add vision alice bob")]
    Team {
        #[command(subcommand)]
        command: TeamCommand,
    },
    /// Make, revoke, list tokens
    #[command(after_help = "Example:\n  grid-mount catalog token new alice --label laptop --days 90")]
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and port; port 0 takes a free one, which is printed
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    pub listen: std::net::SocketAddr,
    /// PEM file: serve https
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    pub tls_key: Option<PathBuf>,
    /// TOML file: which keys are lent for which store
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,
    /// One line of JSON per request; without it, in the log
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Requests per second and token
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// A mount that has not renewed its lease for so long counts as gone
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub lease: u64,
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make a user, in no team and without a token
    Add { user: String },
    /// Remove a user with all tokens; datastores stay
    Remove { user: String },
    /// One a line
    List,
}

#[derive(Debug, Subcommand)]
pub enum TeamCommand {
    /// Add members; makes the team if there is none
    Add { team: String, members: Vec<String> },
    /// Remove members; without any, the team
    Remove { team: String, members: Vec<String> },
    /// Teams and members
    List,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a new token, once
    New {
        user: String,
        /// What it is for
        #[arg(long, default_value = "")]
        label: String,
        /// Good for so many days; without it, until revoked
        #[arg(long)]
        days: Option<u32>,
    },
    /// By its id, or the token itself
    Revoke { id: String },
    /// Ids, users, dates; never the tokens
    List,
}
