//! `grid-mount list`, `info`, `alias`.

use std::sync::Arc;

use serde::Serialize;

use super::{
    CliError,
    args::{AliasArgs, InfoArgs, ListArgs},
    config::{self, Overrides},
    output,
};
use crate::{
    catalog::{self, Alias, Catalog, Lease, OriginLocation, Record},
    config::{Settings, Source},
    origin::{StoreKind, StoreUrl},
    reference::{Reference, UserName, VersionNumber},
};

/// The catalog in force. The embedded one is there from the start: nobody has to make it.
pub async fn open(settings: &Settings) -> Result<Arc<dyn Catalog>, CliError> {
    if settings.catalog.source == Source::Default {
        make_directory(&settings.catalog.value)?;
    }
    let store_settings = config::store_settings()?;
    let connected = catalog::connect(&settings.catalog.value, &store_settings).await;
    connected.map_err(CliError::failed)
}

/// As [`open`], for publishing: a directory that is named as catalog for the first time is made.
pub async fn open_to_publish(settings: &Settings) -> Result<Arc<dyn Catalog>, CliError> {
    make_directory(&settings.catalog.value)?;
    let store_settings = config::store_settings()?;
    let connected = catalog::connect_to_publish(&settings.catalog.value, &store_settings).await;
    connected.map_err(CliError::failed)
}

pub fn make_directory(catalog: &StoreUrl) -> Result<(), CliError> {
    let StoreKind::File(dir) = catalog.kind() else {
        return Ok(());
    };
    std::fs::create_dir_all(&dir)
        .map_err(|error| CliError::Failed(format!("the catalog {catalog} cannot be made: {error}").into()))
}

/// Who I am: as the catalog says, where it knows.
pub fn me(catalog: &dyn Catalog, settings: &Settings) -> UserName {
    catalog.me().unwrap_or(&settings.user.value).clone()
}

pub async fn list(args: ListArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let named = args.owner.as_deref().map(str::parse::<UserName>);
    let named = named.transpose().map_err(CliError::usage)?;
    let catalog = open(&settings).await?;
    let owner = match (named, args.global) {
        (_, true) => None,
        (Some(owner), false) => Some(owner),
        (None, false) => Some(me(&*catalog, &settings)),
    };
    let found = catalog.list(owner.as_ref()).await;
    let datastores = match found {
        // Having published nothing is no error of mine; a teammate's name that nobody has is.
        Err(catalog::CatalogError::NoSuchUser { .. }) if args.owner.is_none() => Vec::new(),
        found => found.map_err(CliError::failed)?,
    };
    if args.output.json {
        output::print_json(&datastores);
        return Ok(());
    }
    if datastores.is_empty() {
        output::note("nothing has been published yet (`grid-mount publish DIR NAME`)");
        return Ok(());
    }
    let rows: Vec<Vec<String>> = datastores
        .iter()
        .map(|datastore| vec![datastore.name.to_string(), datastore.latest.to_string()])
        .collect();
    output::print(&output::table(&["DATASTORE", "LATEST"], &rows));
    Ok(())
}

/// The shape of `info --json`.
#[derive(Serialize)]
struct Info {
    #[serde(flatten)]
    record: Record,
    /// Where the bytes are.
    origin_url: StoreUrl,
    /// Every version there is.
    versions: Vec<VersionNumber>,
    aliases: Vec<Alias>,
    /// Who has which version mounted, as far as the catalog is told.
    mounted: Vec<Lease>,
}

pub async fn info(args: InfoArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let reference: Reference = args.reference.parse().map_err(CliError::usage)?;
    let catalog = open(&settings).await?;
    let record = catalog
        .resolve(&reference, &settings.user.value)
        .await
        .map_err(CliError::failed)?;
    let name = record.name();
    let (versions, aliases, mounted) = futures::try_join!(
        catalog.versions(&name),
        catalog.aliases(&name),
        catalog.leases(&name)
    )
    .map_err(CliError::failed)?;
    let origin_url = match &record.origin {
        OriginLocation::Catalog => catalog.store().url().clone(),
        OriginLocation::Url(url) => url.clone(),
    };
    let info = Info {
        record,
        origin_url,
        versions,
        aliases,
        mounted,
    };
    if args.output.json {
        output::print_json(&info);
    } else {
        output::print(&text(&info));
    }
    Ok(())
}

fn text(info: &Info) -> String {
    let record = &info.record;
    let versions: Vec<String> = info.versions.iter().map(ToString::to_string).collect();
    let aliases: Vec<String> = info
        .aliases
        .iter()
        .map(|alias| format!("{} → {}", alias.alias, alias.version))
        .collect();
    let mounted: Vec<String> = info
        .mounted
        .iter()
        .map(|lease| format!("{} on {} ({})", lease.user, lease.host, lease.reference.version))
        .collect();
    let mut rows = vec![
        ("reference", record.reference().to_string()),
        (
            "size",
            format!(
                "{} ({} bytes)",
                output::bytes(record.totals.bytes),
                record.totals.bytes
            ),
        ),
        (
            "holds",
            format!(
                "{} files, {} directories, {} symlinks",
                record.totals.files, record.totals.directories, record.totals.symlinks
            ),
        ),
        (
            "created",
            record.created.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        ),
        ("origin", info.origin_url.to_string()),
        ("message", record.message.clone()),
        ("versions", versions.join(", ")),
        ("aliases", aliases.join(", ")),
        ("mounted by", mounted.join(", ")),
    ];
    rows.retain(|(_, value)| !value.is_empty());
    rows.into_iter()
        .map(|(key, value)| format!("{key:10} {value}\n"))
        .collect()
}

pub async fn alias(args: AliasArgs) -> Result<(), CliError> {
    let settings = config::load(&Overrides::of(&args.catalog, &Default::default()))?;
    let reference: Reference = args.reference.parse().map_err(CliError::usage)?;
    let alias = args.alias.parse().map_err(CliError::usage)?;
    let catalog = open(&settings).await?;
    if args.remove {
        let name = reference.qualify(&me(&*catalog, &settings));
        catalog
            .remove_alias(&name, &alias)
            .await
            .map_err(CliError::failed)?;
        output::print(&format!("{name} has no alias {alias} any more\n"));
        return Ok(());
    }
    let record = catalog
        .resolve(&reference, &settings.user.value)
        .await
        .map_err(CliError::failed)?;
    let alias = Alias {
        alias,
        version: record.version,
    };
    catalog
        .set_alias(&record.name(), &alias)
        .await
        .map_err(CliError::failed)?;
    output::print(&format!(
        "{}/{} is {}\n",
        record.name(),
        alias.alias,
        record.reference()
    ));
    Ok(())
}
