//! `grid-mount publish`, `grid-mount register`.

use std::sync::Arc;

use serde::Serialize;

use super::{
    CliError,
    args::{CatalogArgs, OutputArgs, PublishArgs, RegisterArgs},
    catalog::{me, open_to_publish},
    config::{self, Overrides},
    output,
    progress::Shown,
};
use crate::{
    catalog::Record,
    config::Settings,
    origin::{Deadlines, Store, StoreUrl},
    publish::{self, Progress, PublishError, PublishOptions, Published, Report},
    reference::{Reference, VersionSelector},
};

/// The shape of `publish --json` and `register --json`.
#[derive(Serialize)]
struct Outcome<'published> {
    reference: String,
    record: &'published Record,
    report: &'published Report,
}

pub async fn publish(args: PublishArgs) -> Result<(), CliError> {
    let (settings, reference) = prepare(&args.catalog, &args.name)?;
    let catalog = open_to_publish(&settings).await?;
    let name = reference.qualify(&me(&*catalog, &settings));
    let scratch = tempfile::tempdir().map_err(CliError::failed)?;
    let mut options = PublishOptions::new(scratch.path());
    options.message = args.message;
    options.checksum = args.checksum;
    let shown = Arc::new(Shown::new());
    let listener = Arc::clone(&shown) as Arc<dyn Progress>;
    let published = publish::publish_directory(&args.directory, name, &*catalog, &options, listener);
    finish(published, &shown, &args.output).await
}

pub async fn register(args: RegisterArgs) -> Result<(), CliError> {
    let (settings, reference) = prepare(&args.catalog, &args.name)?;
    let url: StoreUrl = args.url.parse().map_err(CliError::usage)?;
    let catalog = open_to_publish(&settings).await?;
    let name = reference.qualify(&me(&*catalog, &settings));
    let store_settings = config::store_settings()?;
    let store = Store::open(&url, &store_settings, &Deadlines::control()).map_err(CliError::failed)?;
    let scratch = tempfile::tempdir().map_err(CliError::failed)?;
    let mut options = PublishOptions::new(scratch.path());
    options.message = args.message;
    let shown = Arc::new(Shown::new());
    let listener = Arc::clone(&shown) as Arc<dyn Progress>;
    let published = publish::register(url, &store, name, &*catalog, &options, listener);
    finish(published, &shown, &args.output).await
}

/// Whose and which datastore: only my own can be published.
fn prepare(catalog: &CatalogArgs, name: &str) -> Result<(Settings, Reference), CliError> {
    let settings = config::load(&Overrides::of(catalog, &Default::default()))?;
    let reference: Reference = name.parse().map_err(CliError::usage)?;
    if reference.version != VersionSelector::Latest || name.contains('/') {
        return Err(CliError::Usage(format!(
            "{name}: name a datastore without a version; publishing gives it the next one"
        )));
    }
    Ok((settings, reference))
}

/// Waits for the end or for Ctrl-C; an interrupted publish is not visible, and goes on where it was.
async fn finish(
    published: impl Future<Output = Result<Published, PublishError>>,
    shown: &Shown,
    output: &OutputArgs,
) -> Result<(), CliError> {
    let published = tokio::select! {
        published = published => published,
        _ = tokio::signal::ctrl_c() => {
            shown.finish();
            return Err(CliError::Failed("interrupted; run it again to upload only what is missing".into()));
        }
    };
    shown.finish();
    let published = published.map_err(CliError::failed)?;
    let reference = published.record.reference().to_string();
    if output.json {
        output::print_json(&Outcome {
            reference,
            record: &published.record,
            report: &published.report,
        });
        return Ok(());
    }
    summarize(&published);
    output::print(&format!("{reference}\n"));
    Ok(())
}

/// For people, beside the reference that scripts read from standard output.
fn summarize(published: &Published) {
    let (totals, report) = (&published.record.totals, &published.report);
    output::note(&format!(
        "{} files, {}; {} objects uploaded ({}), {} files as in the version before",
        totals.files,
        output::bytes(totals.bytes),
        report.uploaded_objects,
        output::bytes(report.uploaded_bytes),
        report.unchanged_files,
    ));
    if report.hard_linked_files > 0 {
        output::note(&format!(
            "{} hard-linked names became files of their own",
            report.hard_linked_files
        ));
    }
    for (reason, skipped) in &report.skipped.reasons {
        let more = if skipped.count > skipped.examples.len() as u64 {
            ", …"
        } else {
            ""
        };
        output::note(&format!(
            "{} left out ({}): {}{more}",
            skipped.count,
            reason.describe(),
            skipped.examples.join(", ")
        ));
    }
}
