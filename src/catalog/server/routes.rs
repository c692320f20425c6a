//! The protocol's paths: who is asking, whether they may, and what they are told.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    extract::{
        DefaultBodyLimit, Path, Query, Request, State,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use base64::Engine as _;
use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use super::{ControlPlane, Directory, audit::Line, lending::Wish, problem_of};
use crate::{
    catalog::{
        Alias, Catalog, CatalogError, Draft, Lease, LeaseId, OriginLocation, Record,
        protocol::{
            Datastore, Datastores, Held, IDEMPOTENCY_KEY, Kind, Leases, Loan, MOST_PER_PAGE, Me, NewAlias,
            NewLease, NewVersion, PROBLEM_JSON, Page, Problem, Purpose, Resolution, Teams,
        },
    },
    digest::Digest,
    origin::{Secret, StoreUrl},
    reference::{
        AliasName, DatastoreName, PinnedReference, QualifiedName, Reference, UserName, VersionNumber,
        did_you_mean,
    },
};

const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");
/// A record and its message.
const MOST_BODY: usize = 256 << 10;
/// No request takes longer; the store's own deadlines end sooner.
const DEADLINE: Duration = Duration::from_secs(60);
/// Leaves room in a record, whatever the characters.
const MOST_MESSAGE: usize = 16 << 10;
const MOST_KEY: usize = 256;
const MOST_HOST: usize = 255;

type Plane = State<Arc<ControlPlane>>;
type Who = Extension<Caller>;
type Names<T> = Result<Path<T>, PathRejection>;
type Asked<T> = Result<Query<T>, QueryRejection>;
type Content = Result<Bytes, BytesRejection>;
type Answer = Result<Response, Refusal>;

pub(super) fn router(plane: Arc<ControlPlane>) -> Router {
    let named = Router::new()
        .route("/v1/me", get(me))
        .route("/v1/teams", get(teams))
        .route("/v1/leases", get(all_leases))
        .route("/v1/datastores", get(datastores))
        .route("/v1/datastores/{owner}/{datastore}", get(datastore))
        .route("/v1/datastores/{owner}/{datastore}/leases", get(leases))
        .route(
            "/v1/datastores/{owner}/{datastore}/upload-credentials",
            post(to_upload),
        )
        .route("/v1/datastores/{owner}/{datastore}/versions", post(publish))
        .route(
            "/v1/datastores/{owner}/{datastore}/versions/{version}",
            get(resolve).delete(retire),
        )
        .route(
            "/v1/datastores/{owner}/{datastore}/versions/{version}/credentials",
            post(to_read),
        )
        .route(
            "/v1/datastores/{owner}/{datastore}/versions/{version}/leases/{id}",
            put(hold).delete(release),
        )
        .route(
            "/v1/datastores/{owner}/{datastore}/aliases/{alias}",
            put(set_alias).delete(remove_alias),
        )
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_that_way)
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .layer(middleware::from_fn_with_state(Arc::clone(&plane), admit));
    Router::new()
        .route("/health", get(async || StatusCode::NO_CONTENT))
        .route("/v1/openapi.yaml", get(openapi))
        .method_not_allowed_fallback(not_that_way)
        .merge(named)
        .with_state(plane)
}

/// Who is asking, and everything there is to know about whom they may read.
#[derive(Clone)]
struct Caller {
    user: UserName,
    directory: Arc<Directory>,
}

impl Caller {
    /// Mine, or a teammate's. Everybody else is absent, whether or not there is such a user.
    fn may_read(&self, owner: &UserName) -> Result<(), CatalogError> {
        if self.directory.may_read(&self.user, owner) {
            return Ok(());
        }
        let readable = self.directory.readable_by(&self.user);
        let near = did_you_mean(owner.as_str(), readable.iter().map(UserName::as_str));
        Err(CatalogError::NotInTeam {
            user: owner.clone(),
            did_you_mean: readable.iter().find(|user| Some(user.as_str()) == near).cloned(),
        })
    }

    /// Mine only. What may not even be read is absent, here too.
    fn may_change(&self, owner: &UserName) -> Result<(), CatalogError> {
        self.may_read(owner)?;
        if self.user == *owner {
            return Ok(());
        }
        Err(CatalogError::NotYours {
            owner: owner.clone(),
            me: self.user.clone(),
        })
    }
}

struct Refusal {
    problem: Problem,
    wait: Option<Duration>,
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self { problem, wait: None }
    }
}

impl From<CatalogError> for Refusal {
    fn from(error: CatalogError) -> Self {
        let problem = problem_of(&error);
        if problem.status >= 500 {
            tracing::error!(error = crate::causes::in_one_line(&error), "a request failed");
        }
        problem.into()
    }
}

fn bad(detail: impl std::fmt::Display) -> Refusal {
    Problem::new(Kind::BadRequest, detail.to_string()).into()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = json_with(status, &self.problem, PROBLEM_JSON);
        let headers = response.headers_mut();
        if status == StatusCode::UNAUTHORIZED {
            headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            headers.append(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"grid-mount\""),
            );
        }
        if let Some(wait) = self.wait {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    json_with(status, value, "application/json")
}

fn json_with(status: StatusCode, value: &impl Serialize, kind: &'static str) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => (
            status,
            [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")],
            bytes,
        )
            .into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// An answer that the caller may have already.
fn tagged(headers: &HeaderMap, value: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(value).map_err(bad)?;
    let tag = format!("\"{}\"", &Digest::of(&bytes).to_string()[..32]);
    let matches = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|one| matches!(one.trim().trim_start_matches("W/"), one if one == tag || one == "*"));
    let headers = [
        (header::ETAG, tag),
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::CACHE_CONTROL, "private, no-cache".to_owned()),
    ];
    Ok(if matches {
        (StatusCode::NOT_MODIFIED, headers).into_response()
    } else {
        (headers, bytes).into_response()
    })
}

/// The token of a request: `Bearer TOKEN`, or `Basic` with a user and the token as password.
fn token(headers: &HeaderMap) -> Option<(Option<String>, Secret)> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some((None, Secret::new(rest.trim())));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(rest.trim())
        .ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, key) = text.split_once(':')?;
    Some((Some(user.to_owned()), Secret::new(key)))
}

impl ControlPlane {
    async fn caller(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        let wrong = |detail: &str| Refusal::from(Problem::new(Kind::WrongToken, detail));
        let Some((claimed, secret)) = token(headers) else {
            return Err(wrong("the request carries no token"));
        };
        let digest = Digest::of(secret.expose().as_bytes());
        if let Err(wait) = self.limits.admit(&digest) {
            return Err(Refusal {
                problem: Problem::new(Kind::TooMany, "too many requests; wait a little"),
                wait: Some(wait),
            });
        }
        let directory = self.directory.read().await.map_err(|error| {
            tracing::error!(
                error = crate::causes::in_one_line(&error),
                "who is who cannot be read"
            );
            Problem::new(Kind::Unavailable, "who is who cannot be read; its log says why")
        })?;
        let user = directory.owner_of(&digest, Timestamp::now()).cloned();
        let good = user.filter(|user| claimed.is_none_or(|claimed| claimed == user.as_str()));
        let Some(user) = good else {
            self.limits.stranger(&digest);
            return Err(wrong(
                "nobody has this token: it was revoked, has expired, or never was",
            ));
        };
        self.limits.known(&digest);
        Ok(Caller { user, directory })
    }
}

/// Every request: who it is, the deadline, and the audit log.
async fn admit(State(plane): Plane, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut user = None;
    let response = match plane.caller(request.headers()).await {
        Err(refusal) => refusal.into_response(),
        Ok(caller) => {
            user = Some(caller.user.to_string());
            request.extensions_mut().insert(caller);
            match tokio::time::timeout(DEADLINE, next.run(request)).await {
                Ok(response) => response,
                Err(_) => Refusal::from(Problem::new(
                    Kind::Unavailable,
                    "the catalog's store does not answer",
                ))
                .into_response(),
            }
        }
    };
    let line = Line {
        at: Timestamp::now(),
        user,
        method: method.to_string(),
        path,
        status: response.status().as_u16(),
        milliseconds: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    plane.audit.note(line).await;
    response
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/yaml")], OPENAPI).into_response()
}

async fn nothing_here() -> Refusal {
    Problem::new(
        Kind::NoSuchPath,
        "the protocol has no such path; GET /v1/openapi.yaml says which it has",
    )
    .into()
}

async fn not_that_way(method: Method) -> Response {
    let mut problem = Problem::new(Kind::BadRequest, format!("{method} is not for this path"));
    problem.status = 405;
    Refusal::from(problem).into_response()
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(bad)
}

/// The path's owner and datastore.
fn named(owner: &str, datastore: &str) -> Result<QualifiedName, Refusal> {
    Ok(QualifiedName::new(
        parsed::<UserName>(owner)?,
        parsed::<DatastoreName>(datastore)?,
    ))
}

fn number(text: &str) -> Result<VersionNumber, Refusal> {
    parsed(text)
}

fn content<T: DeserializeOwned>(body: Content) -> Result<T, Refusal> {
    let bytes = body.map_err(|rejection| {
        let mut problem = Problem::new(Kind::BadRequest, rejection.body_text());
        problem.status = rejection.status().as_u16();
        problem
    })?;
    let mut value: serde_json::Value = serde_json::from_slice(&bytes).map_err(bad)?;
    whole_numbers(&mut value);
    serde_json::from_value(value).map_err(bad)
}

/// To JSON, 3.0 is an integer; to Rust, it is not. Bodies are small, and serde_json bounds their depth.
fn whole_numbers(value: &mut serde_json::Value) {
    /// Up to here every integer is a float.
    const EXACT: f64 = 9_007_199_254_740_992.0;

    match value {
        serde_json::Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        serde_json::Value::Number(number) if number.is_f64() => {
            let whole = number
                .as_f64()
                .filter(|float| float.fract() == 0.0 && (0.0..=EXACT).contains(float));
            if let Some(float) = whole {
                *value = (float as u64).into();
            }
        }
        _ => {}
    }
}

async fn me(State(plane): Plane, Extension(caller): Who) -> Answer {
    let teams = caller.directory.teams_of(&caller.user);
    Ok(json(
        StatusCode::OK,
        &Me {
            teams: teams.into_iter().map(|team| team.name).collect(),
            user: caller.user,
            store: plane.catalog.store().url().clone(),
        },
    ))
}

async fn teams(Extension(caller): Who, headers: HeaderMap) -> Answer {
    let teams = caller.directory.teams_of(&caller.user);
    tagged(&headers, &Teams { teams })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PageAsked {
    owner: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

impl PageAsked {
    /// One user's, or everybody's whom the caller may read; sorted.
    fn owners(&self, caller: &Caller) -> Result<Vec<UserName>, Refusal> {
        match &self.owner {
            None => Ok(caller.directory.readable_by(&caller.user).into_iter().collect()),
            Some(owner) => {
                let owner: UserName = parsed(owner)?;
                caller.may_read(&owner)?;
                Ok(vec![owner])
            }
        }
    }

    fn limit(&self) -> Result<usize, Refusal> {
        match self.limit.unwrap_or(MOST_PER_PAGE) {
            limit @ 1..=MOST_PER_PAGE => Ok(limit),
            _ => Err(bad(format!("a page has 1 to {MOST_PER_PAGE} items"))),
        }
    }
}

async fn datastores(
    State(plane): Plane,
    Extension(caller): Who,
    asked: Asked<PageAsked>,
    headers: HeaderMap,
) -> Answer {
    let Query(asked) = asked.map_err(|error| bad(error.body_text()))?;
    let (owners, limit) = (asked.owners(&caller)?, asked.limit()?);
    let page: Datastores = plane.catalog.page(&owners, asked.after.as_deref(), limit).await?;
    tagged(&headers, &page)
}

async fn all_leases(
    State(plane): Plane,
    Extension(caller): Who,
    asked: Asked<PageAsked>,
    headers: HeaderMap,
) -> Answer {
    let Query(asked) = asked.map_err(|error| bad(error.body_text()))?;
    let (owners, limit) = (asked.owners(&caller)?, asked.limit()?);
    let after = asked.after.as_deref().map(parsed::<UserName>).transpose()?;
    // Whole users to a page: mounts are few beside what is published.
    let mut page: Leases = Page {
        items: Vec::new(),
        next: None,
    };
    for owner in owners {
        if after.as_ref().is_some_and(|after| owner <= *after) {
            continue;
        }
        page.items.extend(plane.catalog.leases_of_owner(&owner).await?);
        if page.items.len() >= limit {
            page.next = Some(owner.to_string());
            break;
        }
    }
    tagged(&headers, &page)
}

async fn datastore(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String)>,
    headers: HeaderMap,
) -> Answer {
    let Path((owner, datastore)) = path.map_err(|error| bad(error.body_text()))?;
    let name = named(&owner, &datastore)?;
    caller.may_read(&name.owner)?;
    let (versions, aliases) =
        futures::try_join!(plane.catalog.versions(&name), plane.catalog.aliases(&name))?;
    tagged(
        &headers,
        &Datastore {
            name,
            versions,
            aliases,
        },
    )
}

async fn leases(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String)>,
    headers: HeaderMap,
) -> Answer {
    let Path((owner, datastore)) = path.map_err(|error| bad(error.body_text()))?;
    let name = named(&owner, &datastore)?;
    caller.may_read(&name.owner)?;
    let items = plane.catalog.leases_of(&name, None).await?;
    tagged(&headers, &Leases { items, next: None })
}

async fn resolve(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String)>,
) -> Answer {
    let Path((owner, datastore, version)) = path.map_err(|error| bad(error.body_text()))?;
    let name = named(&owner, &datastore)?;
    let reference: Reference = parsed(&format!("{name}/{version}"))?;
    caller.may_read(&name.owner)?;
    let record = plane.catalog.resolve(&reference, &caller.user).await?;
    let tree_credentials = plane.lend(Purpose::Tree, &record, &caller.user).await?;
    let origin_credentials = match record.origin {
        OriginLocation::Catalog => None,
        OriginLocation::Url(_) => plane.lend(Purpose::Origin, &record, &caller.user).await?,
    };
    let store = plane.catalog.store().url().clone();
    let origin = match &record.origin {
        OriginLocation::Catalog => store.clone(),
        OriginLocation::Url(url) => url.clone(),
    };
    Ok(json(
        StatusCode::OK,
        &Resolution {
            record,
            tree_store: store,
            origin,
            tree_credentials,
            origin_credentials,
        },
    ))
}

impl ControlPlane {
    async fn lend(
        &self,
        purpose: Purpose,
        record: &Record,
        user: &UserName,
    ) -> Result<Option<Loan>, Refusal> {
        let (url, wish) = match (purpose, &record.origin) {
            (Purpose::Origin, OriginLocation::Url(url)) => (url, Wish::ReadObjects(record)),
            _ => (self.catalog.store().url(), Wish::ReadTree(record)),
        };
        self.lending
            .lend(url, wish, user)
            .await
            .map_err(|error| not_lent(&error))
    }
}

fn not_lent(error: &super::LendingError) -> Refusal {
    tracing::error!(error = crate::causes::in_one_line(error), "nothing was lent");
    Problem::new(
        Kind::Unavailable,
        "the control plane has no keys to lend; its log says why",
    )
    .into()
}

/// The loan, or that there is none.
fn lent(loan: Option<Loan>) -> Response {
    match loan {
        Some(loan) => json(StatusCode::OK, &loan),
        None => StatusCode::NO_CONTENT.into_response(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoanAsked {
    #[serde(rename = "for")]
    purpose: Option<Purpose>,
}

async fn to_read(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String)>,
    asked: Asked<LoanAsked>,
) -> Answer {
    let Path((owner, datastore, version)) = path.map_err(|error| bad(error.body_text()))?;
    let Query(asked) = asked.map_err(|error| bad(error.body_text()))?;
    let reference = named(&owner, &datastore)?.at(number(&version)?);
    caller.may_read(&reference.name.owner)?;
    // Whoever mounted it before it was retired reads on.
    let record = plane.catalog.record_even_if_retired(&reference).await?;
    let purpose = asked.purpose.unwrap_or(Purpose::Tree);
    Ok(lent(plane.lend(purpose, &record, &caller.user).await?))
}

async fn to_upload(State(plane): Plane, Extension(caller): Who, path: Names<(String, String)>) -> Answer {
    let Path((owner, datastore)) = path.map_err(|error| bad(error.body_text()))?;
    let name = named(&owner, &datastore)?;
    caller.may_change(&name.owner)?;
    let url = plane.catalog.store().url();
    let loan = plane.lending.lend(url, Wish::Publish, &caller.user).await;
    Ok(lent(loan.map_err(|error| not_lent(&error))?))
}

async fn publish(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String)>,
    headers: HeaderMap,
    body: Content,
) -> Answer {
    let Path((owner, datastore)) = path.map_err(|error| bad(error.body_text()))?;
    let name = named(&owner, &datastore)?;
    let key = match headers.get(IDEMPOTENCY_KEY).map(HeaderValue::to_str) {
        None => None,
        Some(Ok(key)) if (1..=MOST_KEY).contains(&key.len()) => Some(key),
        Some(_) => return Err(bad("an idempotency key has 1 to 256 visible characters")),
    };
    caller.may_change(&name.owner)?;
    let new: NewVersion = content(body)?;
    let parts = [
        Some(&new.tree.rows),
        new.tree.digests.as_ref(),
        new.tree.sums.as_ref(),
    ];
    if let Some(part) = parts.into_iter().flatten().find(|part| !is_tree_key(&part.key)) {
        return Err(bad(format!("{:?} is not a key of a tree", part.key)));
    }
    if new.message.chars().count() > MOST_MESSAGE {
        return Err(bad(format!("a message has at most {MOST_MESSAGE} characters")));
    }
    if let OriginLocation::Url(url) = &new.origin {
        if matches!(url.scheme(), "http" | "https") {
            return Err(bad(
                "an origin that is registered is at s3://, gs://, az:// or file://",
            ));
        }
        refuse_overlap(url, plane.catalog.store().url())?;
    }
    let draft = Draft {
        name: name.clone(),
        tree: new.tree,
        origin: new.origin,
        message: new.message,
        totals: new.totals,
    };
    let record = match key {
        None => plane.catalog.publish(draft).await?,
        Some(key) => {
            // Only the same user's same key means the same version.
            let told = format!("{}\n{name}\n{key}", caller.user);
            let nonce = Digest::of(told.as_bytes()).to_string()[..32].to_owned();
            plane.catalog.publish_once(draft, nonce).await?
        }
    };
    let mut response = json(StatusCode::CREATED, &record);
    let location = crate::catalog::protocol::version_path(&record.reference());
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// A version registered over the catalog itself would be a way to everybody's trees and records.
fn refuse_overlap(url: &StoreUrl, catalog: &StoreUrl) -> Result<(), Refusal> {
    let (url, catalog) = (format!("{url}/"), format!("{catalog}/"));
    if url.starts_with(&catalog) || catalog.starts_with(&url) {
        return Err(bad("an origin cannot be in the catalog, nor around it"));
    }
    Ok(())
}

/// Records must not lead to what is no tree: a version's readers are lent keys for what it names.
fn is_tree_key(key: &str) -> bool {
    key.strip_prefix("trees/").is_some_and(|file| {
        let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        !file.is_empty() && file.len() <= 200 && file.chars().all(fit) && !file.starts_with('.')
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetireAsked {
    in_use: Option<bool>,
}

async fn retire(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String)>,
    asked: Asked<RetireAsked>,
) -> Answer {
    let Path((owner, datastore, version)) = path.map_err(|error| bad(error.body_text()))?;
    let Query(asked) = asked.map_err(|error| bad(error.body_text()))?;
    let reference = named(&owner, &datastore)?.at(number(&version)?);
    caller.may_change(&reference.name.owner)?;
    let although_used = asked.in_use.unwrap_or(false);
    plane
        .catalog
        .retire(&reference, &caller.user, although_used)
        .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn set_alias(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String)>,
    body: Content,
) -> Answer {
    let Path((owner, datastore, alias)) = path.map_err(|error| bad(error.body_text()))?;
    let (name, alias) = (named(&owner, &datastore)?, parsed::<AliasName>(&alias)?);
    caller.may_change(&name.owner)?;
    let NewAlias { version } = content(body)?;
    plane.catalog.set_alias(&name, &Alias { alias, version }).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn remove_alias(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String)>,
) -> Answer {
    let Path((owner, datastore, alias)) = path.map_err(|error| bad(error.body_text()))?;
    let (name, alias) = (named(&owner, &datastore)?, parsed::<AliasName>(&alias)?);
    caller.may_change(&name.owner)?;
    plane.catalog.remove_alias(&name, &alias).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The version and the lease of a path; the caller may read the version.
fn leased(
    path: Names<(String, String, String, String)>,
    caller: &Caller,
) -> Result<(PinnedReference, LeaseId), Refusal> {
    let Path((owner, datastore, version, id)) = path.map_err(|error| bad(error.body_text()))?;
    let reference = named(&owner, &datastore)?.at(number(&version)?);
    caller.may_read(&reference.name.owner)?;
    Ok((reference, parsed(&id)?))
}

async fn hold(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String, String)>,
    body: Content,
) -> Answer {
    let (reference, id) = leased(path, &caller)?;
    let new: NewLease = content(body)?;
    if new.host.is_empty() || new.host.len() > MOST_HOST || !new.host.chars().all(|c| c.is_ascii_graphic()) {
        return Err(bad("a host's name has 1 to 255 visible ASCII characters"));
    }
    plane.catalog.record_even_if_retired(&reference).await?;
    let life = plane.options.lease;
    let expires = Timestamp::now().checked_add(life).map_err(bad)?;
    let lease = Lease {
        id,
        reference,
        user: caller.user,
        host: new.host,
        since: new.since,
        expires,
    };
    plane.catalog.put_lease(&lease).await?;
    Ok(json(
        StatusCode::OK,
        &Held {
            expires_in: life.as_secs(),
        },
    ))
}

async fn release(
    State(plane): Plane,
    Extension(caller): Who,
    path: Names<(String, String, String, String)>,
) -> Answer {
    let (reference, id) = leased(path, &caller)?;
    plane.catalog.drop_lease(&reference, &id, &caller.user).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
