//! Users, teams and tokens: who somebody is, and who shares a team with whom.
//!
//! One small document. In a store it is kept as numbered objects that are only ever created
//! (`team/<number, 20 digits>.json`): the highest number is in force, two administrators at once cannot
//! undo each other's change, and every replica sees a change with its next request, since asking for the
//! highest number is one listing. In a file it is replaced by renaming.
//!
//! Of a token only its digest is kept: tokens hold 256 random bits, so nothing slower is needed.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::TryStreamExt;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    catalog::{CatalogError, Damage, Team, sealed},
    digest::Digest,
    origin::{OriginError, PutOutcome, Secret, Store},
    reference::UserName,
};

const PREFIX: &str = "team/";
const KIND: &str = "directory";
/// 50,000 users with a token each.
const LIMIT: u64 = 16 << 20;
/// Administrators who change it at once.
const TRIES: usize = 20;
/// Numbers of old documents that are kept, for whoever wants to see what changed.
const HISTORY: usize = 20;
/// How every token begins, so that scanners for leaked secrets can find one.
pub const TOKEN_PREFIX: &str = "gmt_";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    format: u32,
    #[serde(default)]
    users: BTreeMap<UserName, User>,
    #[serde(default)]
    teams: BTreeMap<String, BTreeSet<UserName>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    #[serde(default)]
    tokens: Vec<Token>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    /// What it is called by whoever revokes it.
    id: String,
    digest: Digest,
    created: Timestamp,
    #[serde(default)]
    expires: Option<Timestamp>,
    #[serde(default)]
    label: String,
}

/// A token as it may be shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenInfo {
    pub id: String,
    pub user: UserName,
    pub created: Timestamp,
    pub expires: Option<Timestamp>,
    pub label: String,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    #[error("there is no user {0}; `grid-mount catalog user add {0}` makes one")]
    NoUser(UserName),
    #[error("there is a user {0} already")]
    UserExists(UserName),
    #[error("there is no team {0}; `grid-mount catalog team add {0}` makes one")]
    NoTeam(String),
    #[error("{0:?} is not a team's name: letters, digits, `.`, `_`, `-`, at most 128")]
    BadTeam(String),
    #[error("there is no token {0}; `grid-mount catalog token list` shows them")]
    NoToken(String),
    #[error("others keep changing users and teams; try again")]
    Contended,
    #[error("{} cannot be read or written", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{place} is damaged: {damage}")]
    Damaged { place: String, damage: Damage },
    #[error("users and teams cannot be read from or written to the catalog's store")]
    Store(#[source] OriginError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("{0} cannot be written as JSON")]
    Encode(&'static str, #[source] serde_json::Error),
}

impl Directory {
    const FORMAT: u32 = 1;

    pub fn new() -> Self {
        Self {
            format: Self::FORMAT,
            ..Self::default()
        }
    }

    /// Whose token it is, unless it has expired.
    pub fn owner_of(&self, digest: &Digest, now: Timestamp) -> Option<&UserName> {
        self.users.iter().find_map(|(name, user)| {
            let good =
                |token: &&Token| token.digest == *digest && token.expires.is_none_or(|expires| expires > now);
            user.tokens.iter().find(good).map(|_| name)
        })
    }

    /// Everybody whose datastores `user` may read: the user, and who shares a team with them. Sorted.
    pub fn readable_by(&self, user: &UserName) -> BTreeSet<UserName> {
        let shared = self.teams.values().filter(|members| members.contains(user));
        let mut all: BTreeSet<UserName> = shared.flatten().cloned().collect();
        all.insert(user.clone());
        all
    }

    pub fn may_read(&self, user: &UserName, owner: &UserName) -> bool {
        user == owner
            || self
                .teams
                .values()
                .any(|members| members.contains(user) && members.contains(owner))
    }

    pub fn teams_of(&self, user: &UserName) -> Vec<Team> {
        self.teams
            .iter()
            .filter(|(_, members)| members.contains(user))
            .map(|(name, members)| Team {
                name: name.clone(),
                members: members.iter().cloned().collect(),
            })
            .collect()
    }

    pub fn users(&self) -> impl Iterator<Item = &UserName> {
        self.users.keys()
    }

    pub fn all_teams(&self) -> Vec<Team> {
        self.teams
            .iter()
            .map(|(name, members)| Team {
                name: name.clone(),
                members: members.iter().cloned().collect(),
            })
            .collect()
    }

    pub fn tokens(&self) -> Vec<TokenInfo> {
        let of = |(user, record): (&UserName, &User)| {
            let user = user.clone();
            let info = move |token: &Token| TokenInfo {
                id: token.id.clone(),
                user: user.clone(),
                created: token.created,
                expires: token.expires,
                label: token.label.clone(),
            };
            record.tokens.iter().map(info).collect::<Vec<_>>()
        };
        self.users.iter().flat_map(of).collect()
    }

    pub fn add_user(&mut self, user: UserName) -> Result<(), DirectoryError> {
        if self.users.contains_key(&user) {
            return Err(DirectoryError::UserExists(user));
        }
        self.users.insert(user, User::default());
        Ok(())
    }

    /// With the user's tokens and memberships; datastores stay.
    pub fn remove_user(&mut self, user: &UserName) -> Result<(), DirectoryError> {
        if self.users.remove(user).is_none() {
            return Err(DirectoryError::NoUser(user.clone()));
        }
        for members in self.teams.values_mut() {
            members.remove(user);
        }
        Ok(())
    }

    /// Makes the team if there is none of that name.
    pub fn add_to_team(&mut self, team: &str, members: &[UserName]) -> Result<(), DirectoryError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if team.is_empty() || team.len() > 128 || !team.chars().all(good) {
            return Err(DirectoryError::BadTeam(team.to_owned()));
        }
        if let Some(stranger) = members.iter().find(|member| !self.users.contains_key(member)) {
            return Err(DirectoryError::NoUser(stranger.clone()));
        }
        self.teams
            .entry(team.to_owned())
            .or_default()
            .extend(members.iter().cloned());
        Ok(())
    }

    /// Without members: the whole team.
    pub fn remove_from_team(&mut self, team: &str, members: &[UserName]) -> Result<(), DirectoryError> {
        let there = self
            .teams
            .get_mut(team)
            .ok_or_else(|| DirectoryError::NoTeam(team.to_owned()))?;
        for member in members {
            there.remove(member);
        }
        if members.is_empty() {
            self.teams.remove(team);
        }
        Ok(())
    }

    /// The token is in the answer and nowhere else.
    pub fn new_token(
        &mut self,
        user: &UserName,
        label: &str,
        expires: Option<Timestamp>,
    ) -> Result<(TokenInfo, Secret), DirectoryError> {
        let record = self
            .users
            .get_mut(user)
            .ok_or_else(|| DirectoryError::NoUser(user.clone()))?;
        let secret = format!(
            "{TOKEN_PREFIX}{:032x}{:032x}",
            rand::random::<u128>(),
            rand::random::<u128>()
        );
        let token = Token {
            id: format!("{:012x}", rand::random::<u64>() >> 16),
            digest: Digest::of(secret.as_bytes()),
            created: Timestamp::now(),
            expires,
            label: label.to_owned(),
        };
        let info = TokenInfo {
            id: token.id.clone(),
            user: user.clone(),
            created: token.created,
            expires,
            label: token.label.clone(),
        };
        record.tokens.push(token);
        Ok((info, Secret::new(secret)))
    }

    /// By the token's id, or by the token itself.
    pub fn revoke(&mut self, id: &str) -> Result<(), DirectoryError> {
        let digest = Digest::of(id.as_bytes());
        let mut found = false;
        for user in self.users.values_mut() {
            user.tokens.retain(|token| {
                let this = token.id == id || token.digest == digest;
                found |= this;
                !this
            });
        }
        if found {
            Ok(())
        } else {
            // Somebody may have given the token itself: it is not to be seen in an error.
            let shown = if id.starts_with(TOKEN_PREFIX) {
                "of that kind"
            } else {
                id
            };
            Err(DirectoryError::NoToken(shown.to_owned()))
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        sealed::unseal(KIND, Self::FORMAT, bytes)
    }

    fn encode(&self) -> Result<Vec<u8>, DirectoryError> {
        sealed::seal(KIND, self).map_err(|source| DirectoryError::Encode("the directory", source))
    }
}

/// Where the directory is kept.
pub enum Keeper {
    Store(InStore),
    File(PathBuf),
}

pub struct InStore {
    store: Store,
    /// The highest number seen, and what it holds: numbered documents never change.
    seen: Mutex<Option<(u64, Arc<Directory>)>>,
}

impl Keeper {
    pub fn in_store(store: Store) -> Self {
        Self::Store(InStore {
            store,
            seen: Mutex::new(None),
        })
    }

    /// What is in force now; empty where there was never anything.
    pub async fn read(&self) -> Result<Arc<Directory>, DirectoryError> {
        match self {
            Self::Store(kept) => kept.read().await.map(|(_, directory)| directory),
            Self::File(path) => read_file(path.clone()).await.map(Arc::new),
        }
    }

    /// Changes it; `change` may be called again with what somebody else has changed meanwhile.
    pub async fn change<T>(
        &self,
        mut change: impl FnMut(&mut Directory) -> Result<T, DirectoryError>,
    ) -> Result<T, DirectoryError> {
        match self {
            Self::File(path) => {
                let lock = path.with_extension("lock");
                let _lock = tokio::task::spawn_blocking(move || lock_file(&lock))
                    .await
                    .map_err(|error| DirectoryError::File {
                        path: path.clone(),
                        source: error.into(),
                    })??;
                let mut directory = read_file(path.clone()).await?;
                let outcome = change(&mut directory)?;
                let (path, bytes) = (path.clone(), directory.encode()?);
                let to = path.clone();
                tokio::task::spawn_blocking(move || replace_file(&to, &bytes))
                    .await
                    .map_err(std::io::Error::other)
                    .flatten()
                    .map_err(|source| DirectoryError::File { path, source })?;
                Ok(outcome)
            }
            Self::Store(kept) => {
                for _ in 0..TRIES {
                    let (number, directory) = kept.read().await?;
                    let mut directory = (*directory).clone();
                    let outcome = change(&mut directory)?;
                    if kept.create(number + 1, &directory).await? {
                        kept.forget_before((number + 1).saturating_sub(HISTORY as u64))
                            .await;
                        return Ok(outcome);
                    }
                }
                Err(DirectoryError::Contended)
            }
        }
    }
}

impl InStore {
    async fn numbers(&self) -> Result<Vec<u64>, DirectoryError> {
        // Few objects: old ones are removed as new ones are made.
        let listing = self.store.list(PREFIX, None).try_collect::<Vec<_>>().await;
        let objects = match listing {
            Err(OriginError::NotFound { .. }) => Vec::new(),
            objects => objects.map_err(DirectoryError::Store)?,
        };
        Ok(objects
            .iter()
            .filter_map(|object| {
                object
                    .key
                    .strip_prefix(PREFIX)?
                    .strip_suffix(".json")?
                    .parse()
                    .ok()
            })
            .collect())
    }

    async fn read(&self) -> Result<(u64, Arc<Directory>), DirectoryError> {
        let number = self.numbers().await?.into_iter().max();
        let Some(number) = number else {
            return Ok((0, Arc::new(Directory::new())));
        };
        if let Some((seen, directory)) = &*self.seen.lock()
            && *seen == number
        {
            return Ok((number, Arc::clone(directory)));
        }
        let key = key(number);
        let (bytes, _) = self.store.get(&key, LIMIT).await.map_err(DirectoryError::Store)?;
        let directory = Directory::decode(&bytes).map_err(|damage| DirectoryError::Damaged {
            place: format!("{}/{key}", self.store.url()),
            damage,
        })?;
        let directory = Arc::new(directory);
        *self.seen.lock() = Some((number, Arc::clone(&directory)));
        Ok((number, directory))
    }

    /// `false` when somebody else has made this number.
    async fn create(&self, number: u64, directory: &Directory) -> Result<bool, DirectoryError> {
        let bytes = Bytes::from(directory.encode()?);
        let key = key(number);
        let made = self.store.put_if_absent(&key, bytes.clone()).await;
        match made.map_err(DirectoryError::Store)? {
            PutOutcome::Created => Ok(true),
            // Perhaps it was this very request, whose answer was lost.
            PutOutcome::AlreadyExists => {
                let (there, _) = self.store.get(&key, LIMIT).await.map_err(DirectoryError::Store)?;
                Ok(there == bytes)
            }
        }
    }

    async fn forget_before(&self, number: u64) {
        let Ok(numbers) = self.numbers().await else { return };
        for old in numbers.into_iter().filter(|old| *old < number) {
            if let Err(error) = self.store.delete(&key(old)).await {
                tracing::debug!(old, %error, "an old directory stays");
            }
        }
    }
}

fn key(number: u64) -> String {
    format!("{PREFIX}{number:020}.json")
}

async fn read_file(path: PathBuf) -> Result<Directory, DirectoryError> {
    let bytes = match tokio::fs::read(&path).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Directory::new()),
        Err(source) => return Err(DirectoryError::File { path, source }),
    };
    Directory::decode(&bytes).map_err(|damage| DirectoryError::Damaged {
        place: path.display().to_string(),
        damage,
    })
}

fn lock_file(path: &Path) -> Result<nix::fcntl::Flock<std::fs::File>, DirectoryError> {
    let failed = |source| DirectoryError::File {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(failed)?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed(errno.into()))
}

fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::{Deadlines, StoreSettings};

    fn user(name: &str) -> UserName {
        name.parse().unwrap()
    }

    fn keepers(dir: &Path) -> [Keeper; 2] {
        let url = dir.to_str().unwrap().parse().unwrap();
        let store = Store::open(&url, &StoreSettings::default(), &Deadlines::control()).unwrap();
        [Keeper::in_store(store), Keeper::File(dir.join("users.json"))]
    }

    #[tokio::test]
    async fn tokens_are_known_until_they_are_revoked_or_expire() {
        for which in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let keeper = &keepers(dir.path())[which];
            let now = Timestamp::now();
            let (info, secret) = keeper
                .change(|directory| {
                    directory.add_user(user("alice"))?;
                    directory.new_token(&user("alice"), "laptop", None)
                })
                .await
                .unwrap();
            let digest = Digest::of(secret.expose().as_bytes());
            // Another replica.
            let other = &keepers(dir.path())[which];
            assert_eq!(
                other.read().await.unwrap().owner_of(&digest, now),
                Some(&user("alice"))
            );
            let stored = format!("{:?}", other.read().await.unwrap());
            assert!(!stored.contains(secret.expose()));
            keeper
                .change(|directory| directory.revoke(&info.id))
                .await
                .unwrap();
            assert_eq!(other.read().await.unwrap().owner_of(&digest, now), None);
            let (_, short) = keeper
                .change(|directory| {
                    let expires = now + std::time::Duration::from_secs(60);
                    directory.new_token(&user("alice"), "", Some(expires))
                })
                .await
                .unwrap();
            let digest = Digest::of(short.expose().as_bytes());
            let directory = other.read().await.unwrap();
            assert!(directory.owner_of(&digest, now).is_some());
            let later = now + std::time::Duration::from_secs(61);
            assert_eq!(directory.owner_of(&digest, later), None);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_change_is_lost_among_many_administrators() {
        for which in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let adding = (0..12).map(|number| {
                let keeper = keepers(dir.path());
                async move {
                    keeper[which]
                        .change(|directory| directory.add_user(user(&format!("user{number}"))))
                        .await
                        .unwrap();
                }
            });
            futures::future::join_all(adding).await;
            let directory = keepers(dir.path())[which].read().await.unwrap();
            assert_eq!(directory.users().count(), 12);
        }
    }
}
