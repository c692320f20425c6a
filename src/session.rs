//! A session finds its data in place: everything its spec names is mounted, all at once, before it begins.
//!
//! Owns the spec, what became of it, and trying again what may come later. Must not know how anything is
//! mounted: it asks an agent, as a user would.

pub mod record;
pub mod spec;

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open, readlinkat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, symlinkat, unlinkat},
};
use tokio::{task::JoinSet, time::Instant};

use self::{
    record::{Datastore, FORMAT, Place, Record, Standing},
    spec::{Spec, Wanted},
};
use crate::{
    agent::{
        client::{Client, ClientError},
        control::{MountInfo, MountRequest, UnmountRequest, UnmountTarget},
    },
    causes::in_one_line,
};

/// What is not required holds the start up no longer than this after everything else.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(60);
/// Who retries may just be ending.
const RETRYING_PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    #[error("{named}: {reason}")]
    Spec { named: String, reason: String },
    #[error("{} of {of} required datastores cannot be mounted: {}", failed.len(), failed.join("; "))]
    Required { failed: Vec<String>, of: usize },
    #[error(
        "a session is running already ({0}): `grid-mount session add` adds to it, `grid-mount session stop` ends it"
    )]
    Running(PathBuf),
    #[error("no session is running ({0} is not there)")]
    NoSession(PathBuf),
    #[error("{0} is none of this session's datastores, nor where one is mounted")]
    Unknown(String),
    #[error("{path} is taken by {by}")]
    Taken { path: PathBuf, by: String },
    #[error("still mounted: {}", .0.join("; "))]
    StillMounted(Vec<String>),
    #[error("the session's file {path} cannot be used")]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What is said to an agent, but for reference and path.
pub type Template = MountRequest;

/// A session on this host, running or not.
pub struct Session {
    pub client: Client,
    pub template: Template,
    pub place: Place,
}

impl Session {
    fn record_error(&self) -> impl Fn(io::Error) -> SessionError {
        let path = self.place.path().to_owned();
        move |source| SessionError::Record {
            path: path.clone(),
            source,
        }
    }

    /// Mounts everything. What is required is tried for as long as `patience`; what is not is left to
    /// [`Session::retry`].
    pub async fn start(self: &Arc<Self>, spec: &Spec, patience: Duration) -> Result<Record, SessionError> {
        let failed = self.record_error();
        if self.place.read().map_err(&failed)?.is_some() {
            return Err(SessionError::Running(self.place.path().to_owned()));
        }
        let datastores = self.mount_all(&spec.datastores, patience).await;
        let record = Record {
            format: FORMAT,
            started: jiff::Timestamp::now(),
            root: spec.root.clone(),
            link: None,
            datastores,
        };
        if let Err(error) = self.check(&record.datastores) {
            // All or nothing: who starts again finds what was there before.
            self.unmount_all(&record.datastores).await;
            return Err(error);
        }
        let link = spec.user.as_deref().and_then(|user| link(user, &spec.root));
        let record = Record { link, ..record };
        self.place
            .lock()
            .and_then(|locked| locked.write(&record))
            .map_err(&failed)?;
        Ok(record)
    }

    fn check(&self, datastores: &[Datastore]) -> Result<(), SessionError> {
        let required = datastores.iter().filter(|datastore| datastore.required);
        let of = required.clone().count();
        let failed: Vec<String> = required
            .filter(|datastore| datastore.standing != Standing::Mounted)
            .map(|datastore| {
                let why = datastore.error.as_deref().unwrap_or("it has not answered");
                format!("{} ({why})", datastore.requested)
            })
            .collect();
        match failed.is_empty() {
            true => Ok(()),
            false => Err(SessionError::Required { failed, of }),
        }
    }

    /// All at once, in the order they were named.
    async fn mount_all(self: &Arc<Self>, all: &[Wanted], patience: Duration) -> Vec<Datastore> {
        let until = Instant::now() + patience;
        let mut required = JoinSet::new();
        let mut optional = JoinSet::new();
        for (number, wanted) in all.iter().cloned().enumerate() {
            let session = Arc::clone(self);
            match wanted.required {
                true => required.spawn(async move { (number, session.mount_until(&wanted, until).await) }),
                false => optional.spawn(async move { (number, session.mount(&wanted).await) }),
            };
        }
        let mut datastores: Vec<Datastore> = all
            .iter()
            .map(|wanted| Datastore::waiting(wanted, "it has not answered yet".into()))
            .collect();
        while let Some(done) = required.join_next().await {
            if let Ok((number, datastore)) = done {
                datastores[number] = datastore;
            }
        }
        let rest = async {
            while let Some(done) = optional.join_next().await {
                if let Ok((number, datastore)) = done {
                    datastores[number] = datastore;
                }
            }
        };
        // Whoever has not answered by then is asked again; the agent remembers.
        let _ = tokio::time::timeout(PATIENCE, rest).await;
        datastores
    }

    async fn mount_until(&self, wanted: &Wanted, until: Instant) -> Datastore {
        let mut pause = FIRST_PAUSE;
        loop {
            let datastore = self.mount(wanted).await;
            if datastore.standing == Standing::Mounted || Instant::now() + pause > until {
                return datastore;
            }
            tracing::warn!(
                reference = wanted.reference,
                error = datastore.error,
                "not mounted yet; trying again"
            );
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    async fn mount(&self, wanted: &Wanted) -> Datastore {
        match self.try_mount(wanted).await {
            Ok(info) => Datastore::mounted(wanted, &info),
            Err(why) => Datastore::waiting(wanted, why),
        }
    }

    async fn try_mount(&self, wanted: &Wanted) -> Result<MountInfo, String> {
        let mount_point = whole(wanted);
        let request = MountRequest {
            reference: wanted.reference.clone(),
            mount_point: mount_point.clone(),
            prefetch: wanted.prefetch.unwrap_or(self.template.prefetch),
            ..self.template.clone()
        };
        let info = self.client.mount(&request).await;
        let info = info.map_err(|error| in_one_line(&error))?;
        let Some(subdir) = &wanted.subdir else {
            return Ok(info);
        };
        if let Err(why) = show(&info.mount_point.join(subdir), &wanted.path) {
            let _ = self.unmount(&mount_point, false).await;
            return Err(why);
        }
        Ok(info)
    }

    async fn unmount(&self, mount_point: &Path, lazy: bool) -> Result<(), String> {
        let request = UnmountRequest {
            target: UnmountTarget::MountPoint(mount_point.to_owned()),
            lazy,
        };
        match self.client.unmount(&request).await {
            Ok(outcomes) => match outcomes.into_iter().find_map(|outcome| outcome.error) {
                None => Ok(()),
                Some(error) => Err(error),
            },
            // Somebody else did.
            Err(ClientError::Refused(said)) if said.contains("is not mounted") => Ok(()),
            Err(error) if error.is_absence() => Ok(()),
            Err(error) => Err(in_one_line(&error)),
        }
    }

    /// What is in use is detached, and goes with its last user. Returns what could not be unmounted.
    async fn unmount_all(&self, datastores: &[Datastore]) -> Vec<String> {
        let mut still = Vec::new();
        for datastore in datastores {
            if datastore.subdir.is_some() && datastore.path.is_symlink() {
                let _ = fs::remove_file(&datastore.path);
            }
            let Some(mount_point) = &datastore.mount_point else {
                continue;
            };
            if self.unmount(mount_point, false).await.is_ok() {
                continue;
            }
            if let Err(error) = self.unmount(mount_point, true).await {
                still.push(format!("{} ({error})", mount_point.display()));
            }
        }
        still
    }

    pub async fn stop(&self) -> Result<(), SessionError> {
        let failed = self.record_error();
        let record = {
            let locked = self.place.lock().map_err(&failed)?;
            let Some(record) = locked.read().map_err(&failed)? else {
                return Err(SessionError::NoSession(self.place.path().to_owned()));
            };
            // Who retries in the background ends when this is gone.
            locked.remove().map_err(&failed)?;
            record
        };
        if let Some(link) = &record.link {
            unlink(link, &record.root);
        }
        let still = self.unmount_all(&record.datastores).await;
        match still.is_empty() {
            true => Ok(()),
            false => Err(SessionError::StillMounted(still)),
        }
    }

    /// The running session.
    pub fn record(&self) -> Result<Record, SessionError> {
        let record = self.place.read().map_err(self.record_error())?;
        record.ok_or_else(|| SessionError::NoSession(self.place.path().to_owned()))
    }

    /// Adds to the running session.
    pub async fn add(
        self: &Arc<Self>,
        wanted: Wanted,
        patience: Duration,
    ) -> Result<Datastore, SessionError> {
        if let Some(there) = self
            .record()?
            .datastores
            .iter()
            .find(|there| there.path == wanted.path)
        {
            return Err(SessionError::Taken {
                path: wanted.path,
                by: there.requested.clone(),
            });
        }
        let mounted = self.mount_all(std::slice::from_ref(&wanted), patience).await;
        self.check(&mounted)?;
        let failed = self.record_error();
        for datastore in mounted {
            {
                let locked = self.place.lock().map_err(&failed)?;
                if let Some(mut record) = locked.read().map_err(&failed)? {
                    record.datastores.push(datastore.clone());
                    locked.write(&record).map_err(&failed)?;
                    return Ok(datastore);
                }
            }
            // The session was stopped meanwhile.
            self.unmount_all(&[datastore]).await;
        }
        Err(SessionError::NoSession(self.place.path().to_owned()))
    }

    /// Takes from the running session what was asked for as `named`, or is at that path.
    pub async fn remove(&self, named: &str) -> Result<Vec<Datastore>, SessionError> {
        let failed = self.record_error();
        let (gone, kept) = {
            let locked = self.place.lock().map_err(&failed)?;
            let Some(mut record) = locked.read().map_err(&failed)? else {
                return Err(SessionError::NoSession(self.place.path().to_owned()));
            };
            let is_it = |datastore: &Datastore| {
                let resolved = datastore.reference.as_ref().map(ToString::to_string);
                datastore.requested == named
                    || datastore.path == Path::new(named)
                    || resolved.as_deref() == Some(named)
            };
            let (gone, kept): (Vec<_>, Vec<_>) = record.datastores.into_iter().partition(is_it);
            record.datastores = kept;
            if !gone.is_empty() {
                locked.write(&record).map_err(&failed)?;
            }
            (gone, record.datastores)
        };
        if gone.is_empty() {
            let mut known: Vec<_> = kept
                .iter()
                .map(|datastore| datastore.requested.as_str())
                .collect();
            known.push(named);
            return Err(SessionError::Unknown(named.to_owned()));
        }
        let still = self.unmount_all(&gone).await;
        match still.is_empty() {
            true => Ok(gone),
            false => Err(SessionError::StillMounted(still)),
        }
    }

    /// Tries again what is waiting, until nothing is or the session has ended. Only one process does.
    pub async fn retry(self: &Arc<Self>) -> Result<(), SessionError> {
        let failed = self.record_error();
        let Some(_alone) = self.place.hold_retrying(RETRYING_PATIENCE).map_err(&failed)? else {
            return Ok(());
        };
        let mut pause = FIRST_PAUSE;
        let mut before = BTreeSet::new();
        loop {
            let Some(record) = self.place.read().map_err(&failed)? else {
                return Ok(());
            };
            let waiting: Vec<Wanted> = record
                .datastores
                .iter()
                .filter(|datastore| datastore.standing == Standing::Waiting)
                .map(Datastore::wanted)
                .collect();
            if waiting.is_empty() {
                return Ok(());
            }
            let paths: BTreeSet<PathBuf> = waiting.iter().map(|wanted| wanted.path.clone()).collect();
            // Who is new has not been waiting long.
            if !paths.is_subset(&before) {
                pause = FIRST_PAUSE;
            }
            before = paths;
            // Not at the same moment as every other host after a power cut.
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
            pause = (pause * 2).min(LAST_PAUSE);
            let mut tries = JoinSet::new();
            for wanted in waiting {
                let session = Arc::clone(self);
                tries.spawn(async move { session.mount(&wanted).await });
            }
            while let Some(done) = tries.join_next().await {
                if let Ok(datastore) = done {
                    self.settle(datastore).await?;
                }
            }
        }
    }

    /// Writes down how a try ended, if it is still wanted.
    async fn settle(&self, datastore: Datastore) -> Result<(), SessionError> {
        let failed = self.record_error();
        {
            let locked = self.place.lock().map_err(&failed)?;
            if let Some(mut record) = locked.read().map_err(&failed)? {
                let waiting = |there: &&mut Datastore| {
                    there.path == datastore.path && there.standing == Standing::Waiting
                };
                if let Some(there) = record.datastores.iter_mut().find(waiting) {
                    *there = datastore;
                    return locked.write(&record).map_err(&failed);
                }
            }
        }
        self.unmount_all(&[datastore]).await;
        Ok(())
    }
}

/// Where the whole version is mounted: at its path, or hidden beside it if only a part is to be seen there.
fn whole(wanted: &Wanted) -> PathBuf {
    match (&wanted.subdir, wanted.path.file_name()) {
        (Some(_), Some(name)) => wanted
            .path
            .with_file_name(format!(".{}.whole", name.to_string_lossy())),
        _ => wanted.path.clone(),
    }
}

/// Makes `path` a link to the directory `part`.
fn show(part: &Path, path: &Path) -> Result<(), String> {
    match part.metadata() {
        Ok(there) if there.is_dir() => {}
        Ok(_) => return Err(format!("{} is not a directory", part.display())),
        Err(error) => return Err(format!("{}: {error}", part.display())),
    }
    if fs::read_link(path).is_ok_and(|to| to == part) {
        return Ok(());
    }
    symlink(part, path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Links `datastores` in a user's home directory to `root`; `None` if something else is there.
fn link(user: &str, root: &Path) -> Option<PathBuf> {
    let linked = || -> io::Result<PathBuf> {
        let account = nix::unistd::User::from_name(user)?
            .ok_or_else(|| io::Error::other("there is no such user on this host"))?;
        let path = account.dir.join(LINK);
        if path == root {
            return Err(io::Error::other("it is the root itself"));
        }
        let home = home(&account.dir)?;
        match symlinkat(root, &home, LINK) {
            Ok(()) => Ok(path),
            Err(nix::errno::Errno::EEXIST) if points_to(&home, root) => Ok(path),
            Err(errno) => Err(errno.into()),
        }
    };
    match linked() {
        Ok(path) => Some(path),
        Err(error) => {
            tracing::warn!(user, %error, "~/datastores is not linked to {}", root.display());
            None
        }
    }
}

const LINK: &str = "datastores";

/// What is in it belongs to its user: nothing there is followed.
fn home(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(dir, flags, Mode::empty())?)
}

fn points_to(home: &OwnedFd, root: &Path) -> bool {
    readlinkat(home, LINK).is_ok_and(|to| Path::new(&to) == root)
}

fn unlink(link: &Path, root: &Path) {
    if let Some(Ok(home)) = link.parent().map(home)
        && points_to(&home, root)
    {
        let _ = unlinkat(&home, LINK, UnlinkatFlags::NoRemoveDir);
    }
}

/// Makes the directory of a session's record, for its user alone where that is not root.
pub fn make_directory(dir: &Path, mode: u32) -> Result<(), SessionError> {
    match fs::DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(SessionError::Record {
            path: dir.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}
