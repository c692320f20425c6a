//! The tree's builder on a thread of its own: it sorts and spills to disk, which async tasks must not.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    PublishError,
    previous::{FrameCache, Previous},
};
use crate::{
    digest::{BlockSum, Digest},
    tree::{
        Content, Object, ObjectNo, Timestamp,
        builder::{BuiltTree, TreeBuilder},
    },
};

/// Rows on their way to the builder.
const QUEUE: usize = 1024;

/// The publisher's own number of an object, given before the tree gives it one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ObjectId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub object: ObjectId,
    pub offset: u64,
}

#[derive(Debug)]
pub(super) struct Row {
    pub path: Vec<u8>,
    pub mode: u16,
    pub modified: Timestamp,
    pub kind: RowKind,
}

#[derive(Debug)]
pub(super) enum RowKind {
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    File {
        size: u64,
        place: Option<Place>,
        digest: Digest,
    },
}

enum Message {
    Row(Row),
    Object(ObjectId, Object, Vec<BlockSum>),
    /// An object of the previous version, with its sums.
    Kept(ObjectId, ObjectNo),
    Finish,
}

pub(super) struct Assembler {
    sender: mpsc::Sender<Message>,
    thread: JoinHandle<Result<BuiltTree, PublishError>>,
}

impl Assembler {
    pub fn start(scratch: &Path, memory_limit: usize, previous: Option<Arc<Previous>>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let scratch = scratch.to_owned();
        let thread = tokio::task::spawn_blocking(move || assemble(scratch, memory_limit, previous, receiver));
        Self { sender, thread }
    }

    pub async fn row(&mut self, row: Row) -> Result<(), PublishError> {
        self.send(Message::Row(row)).await
    }

    pub async fn object(
        &mut self,
        id: ObjectId,
        object: Object,
        sums: Vec<BlockSum>,
    ) -> Result<(), PublishError> {
        self.send(Message::Object(id, object, sums)).await
    }

    pub async fn kept(&mut self, id: ObjectId, object: ObjectNo) -> Result<(), PublishError> {
        self.send(Message::Kept(id, object)).await
    }

    pub async fn finish(mut self) -> Result<BuiltTree, PublishError> {
        self.send(Message::Finish).await?;
        self.thread.await?
    }

    async fn send(&mut self, message: Message) -> Result<(), PublishError> {
        if self.sender.send(message).await.is_ok() {
            return Ok(());
        }
        // The thread has ended early: its own error says why.
        match (&mut self.thread).await? {
            Ok(_) => Err(PublishError::Assembler),
            Err(error) => Err(error),
        }
    }
}

fn assemble(
    scratch: PathBuf,
    memory_limit: usize,
    previous: Option<Arc<Previous>>,
    mut messages: mpsc::Receiver<Message>,
) -> Result<BuiltTree, PublishError> {
    let mut builder = TreeBuilder::new(&scratch, memory_limit)?;
    let mut numbers: HashMap<ObjectId, ObjectNo> = HashMap::new();
    let mut frames = FrameCache::default();
    while let Some(message) = messages.blocking_recv() {
        match message {
            Message::Object(id, object, sums) => {
                numbers.insert(id, builder.add_object(object, Some(&sums))?);
            }
            Message::Kept(id, object) => {
                let previous = previous.as_ref().ok_or(PublishError::Assembler)?;
                let sums = previous.sums(object, &mut frames)?;
                numbers.insert(id, builder.add_object(previous.object(object)?, Some(&sums))?);
            }
            Message::Row(row) => add(&mut builder, &numbers, row)?,
            Message::Finish => return Ok(builder.finish(&scratch)?),
        }
    }
    // Given up: nobody wants the tree.
    Err(PublishError::Assembler)
}

fn add(
    builder: &mut TreeBuilder,
    numbers: &HashMap<ObjectId, ObjectNo>,
    row: Row,
) -> Result<(), PublishError> {
    let Row {
        path,
        mode,
        modified,
        kind,
    } = row;
    match kind {
        RowKind::Directory => builder.add_directory(&path, mode, modified)?,
        RowKind::Symlink { target } => builder.add_symlink(&path, mode, modified, &target)?,
        RowKind::File { size, place, digest } => {
            let content = match place {
                None => None,
                Some(Place { object, offset }) => {
                    let object = *numbers.get(&object).ok_or(PublishError::Assembler)?;
                    Some(Content { object, offset })
                }
            };
            builder.add_file(&path, mode, modified, size, content, Some(digest))?;
        }
    }
    Ok(())
}
