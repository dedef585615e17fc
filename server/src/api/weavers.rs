//! Making, listing, showing, extending and deleting weavers.

use axum::{
    Json,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode},
};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    ErrorCode, OrgId, WeaverId,
    weaver::{CreateWeaver, DEFAULT_LIFETIME_HOURS, EventKind, ExtendWeaver, MAX_LIFETIME_HOURS, Weaver, WeaverStatus},
};
use serde::Deserialize;

use super::{Body, is_dns_label, repository};
use crate::{
    agents::Hub,
    app::AppState,
    auth::UserCaller,
    fault,
    problem::{Answer, Problem},
    reconcile,
    secrets::hash,
    store::{EndedBy, NewWeaver, WeaverRow},
};

/// The fewest characters of a UUID that may stand for it.
const SHORTEST_PREFIX: usize = 4;
/// The most of an idempotency key, an argument list and an environment, in bytes.
const LONGEST_KEY: usize = 200;
const LONGEST_COMMAND: usize = 64 << 10;
const LONGEST_ENV: usize = 128 << 10;
/// The longest image name and repository URL.
pub(super) const MAX_NAME: usize = 2048;

fn invalid(message: impl Into<String>) -> Problem {
    Problem::new(ErrorCode::InvalidRequest, message)
}

/// Makes a weaver.
#[utoipa::path(post, path = "/api/weavers", tag = "weavers", request_body = CreateWeaver,
    params(("Idempotency-Key" = Option<String>, Header, description = "tries with the same key make one weaver")),
    responses((status = 201, body = Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn create(
    State(app): State<AppState>,
    caller: UserCaller,
    headers: HeaderMap,
    Body(request): Body<CreateWeaver>,
) -> Answer<(StatusCode, Json<Weaver>)> {
    let key = idempotency_key(&headers)?;
    let body_hash = hash(&serde_json::to_string(&request).map_err(anyhow::Error::from)?);
    if let Some(row) = earlier(&app, &caller, key, &body_hash).await? {
        return Ok((StatusCode::CREATED, Json(show(&row, &app))));
    }
    let new = plan(&app, &caller, request)?;
    if app.store.live_weavers(new.org_id).await? >= i64::from(app.config.max_weavers) {
        let message = format!("the organisation has {} weavers, as many as it may", app.config.max_weavers);
        return Err(Problem::new(ErrorCode::TooManyWeavers, message)
            .hint("delete one that is no longer needed: loom ps, loom delete ID"));
    }
    let added = app.store.add_weaver(&new, key.map(|key| (key, body_hash.as_str()))).await;
    if let Err(error) = added {
        if !error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation) {
            return Err(error.into());
        }
        // Another try with the same key came between, or the name is taken.
        return match earlier(&app, &caller, key, &body_hash).await? {
            Some(row) => Ok((StatusCode::CREATED, Json(show(&row, &app)))),
            None => Err(Problem::new(
                ErrorCode::NameTaken,
                format!("there is a weaver named {} already", new.name.unwrap_or_default()),
            )
            .hint("choose another --name, or delete the other weaver")),
        };
    }
    fault::point("weaver-recorded");
    let row = app.store.weaver(new.id).await?.ok_or_else(|| anyhow::anyhow!("a new weaver's row is gone"))?;
    app.events.write(new.id, EventKind::Created, format!("{} made it from {}", caller.user.name, row.image)).await;
    app.reconciler.ring(new.id).await;
    Ok((StatusCode::CREATED, Json(show(&row, &app))))
}

fn idempotency_key(headers: &HeaderMap) -> Answer<Option<&str>> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    match key.to_str() {
        Ok(key) if (1..=LONGEST_KEY).contains(&key.len()) => Ok(Some(key)),
        _ => Err(invalid(format!("Idempotency-Key must be 1 to {LONGEST_KEY} visible characters"))),
    }
}

/// The weaver that an earlier try with the same key made.
async fn earlier(app: &AppState, caller: &UserCaller, key: Option<&str>, body_hash: &str) -> Answer<Option<WeaverRow>> {
    let Some(key) = key else { return Ok(None) };
    match app.store.idempotent(caller.user.id, key).await? {
        Some((weaver, hash)) if hash == body_hash => Ok(app.store.weaver(weaver).await?),
        Some(_) => {
            Err(Problem::new(ErrorCode::IdempotencyConflict, "this Idempotency-Key was used for another request"))
        }
        None => Ok(None),
    }
}

/// Checks a request, and fills in what it leaves out.
fn plan(app: &AppState, caller: &UserCaller, request: CreateWeaver) -> Answer<NewWeaver> {
    let org_id = organisation(caller, request.org_id)?;
    if let Some(name) = &request.name
        && (!is_dns_label(name) || name.parse::<WeaverId>().is_ok())
    {
        return Err(invalid(format!("{name:?} cannot be a weaver's name"))
            .hint("use small letters, digits and dashes, at most 63, with no dash at an end"));
    }
    let image = request.image.unwrap_or_else(|| app.config.default_image.clone());
    check_image(app, &image)?;
    repository::check(request.repo.as_deref(), request.branch.as_deref())?;
    check_command(request.command.as_deref())?;
    let env = check_env(&request.env)?;
    let resources = request.resources.unwrap_or(app.config.resources);
    if resources.cpu_millicores == 0 || resources.memory_mb == 0 {
        return Err(invalid("resources must be above zero"));
    }
    let id = WeaverId::generate();
    let created_at = Timestamp::now();
    Ok(NewWeaver {
        id,
        name: request.name,
        org_id,
        owner_id: caller.user.id,
        image,
        repo: request.repo,
        branch: request.branch,
        command: request.command,
        sealed_env: app.secrets.seal(&id.to_string(), &env),
        resources,
        created_at,
        expires_at: created_at + lifetime(request.lifetime_hours.unwrap_or(DEFAULT_LIFETIME_HOURS))?,
    })
}

/// The organisation that is meant: the one named, or the caller's personal one.
pub(crate) fn organisation(caller: &UserCaller, named: Option<OrgId>) -> Answer<OrgId> {
    let personal = || caller.organisations.first().map(|organisation| organisation.id);
    named.or_else(personal).filter(|org| caller.is_in(*org)).ok_or_else(|| {
        Problem::new(ErrorCode::Forbidden, "you do not belong to this organisation")
            .hint("loom whoami shows those you do")
    })
}

fn lifetime(hours: f64) -> Answer<SignedDuration> {
    if hours.is_finite() && hours > 0.0 && hours <= MAX_LIFETIME_HOURS {
        return Ok(SignedDuration::from_secs_f64(hours * 3600.0));
    }
    Err(Problem::new(ErrorCode::InvalidLifetime, format!("a weaver cannot live {hours} hours"))
        .hint(format!("choose more than 0 and at most {MAX_LIFETIME_HOURS}")))
}

/// A name as in the OCI distribution specification: `[host[:port]/]path[:tag][@digest]`.
fn check_image(app: &AppState, image: &str) -> Answer<()> {
    let reference = image.split_once('@').map_or(image, |(reference, _)| reference);
    let good_part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte))
            && part.starts_with(|first: char| first.is_ascii_alphanumeric())
    };
    let path = reference.rsplit_once('/').map_or(reference, |(_, last)| last);
    let lower = path.split_once(':').map_or(path, |(name, _)| name);
    let good = image.len() <= MAX_NAME
        && reference.split('/').all(good_part)
        && !lower.bytes().any(|byte| byte.is_ascii_uppercase())
        && image.split_once('@').is_none_or(|(_, digest)| {
            digest
                .strip_prefix("sha256:")
                .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
        });
    if !good {
        return Err(Problem::new(
            ErrorCode::InvalidImage,
            format!("{:?} is not the name of an image", image.chars().take(100).collect::<String>()),
        )
        .hint("it looks like python:3.12 or registry.example/team/image@sha256:…"));
    }
    app.provisioner.accepts(image).map_err(|reason| {
        Problem::new(ErrorCode::ImageUnavailable, reason)
            .hint("leave --image out, or use a server with the Kubernetes backend")
    })
}

fn check_command(command: Option<&[String]>) -> Answer<()> {
    let Some(command) = command else { return Ok(()) };
    let length: usize = command.iter().map(String::len).sum();
    if command.first().is_none_or(String::is_empty)
        || length > LONGEST_COMMAND
        || command.iter().any(|word| word.contains('\0'))
    {
        return Err(invalid("the command must name a program, hold no NUL, and be at most 64 KiB"));
    }
    Ok(())
}

/// The environment as JSON, to be sealed.
fn check_env(env: &std::collections::BTreeMap<String, loom_api::Secret>) -> Answer<Vec<u8>> {
    for (name, value) in env {
        let letters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !letters
            || name.is_empty()
            || name.starts_with(|first: char| first.is_ascii_digit())
            || value.expose().contains('\0')
        {
            return Err(invalid(format!("env: {name:?} is not a variable's name, or its value holds a NUL"))
                .hint("names are letters, digits and _, and do not begin with a digit"));
        }
    }
    let json = serde_json::to_vec(env).map_err(anyhow::Error::from)?;
    if json.len() > LONGEST_ENV {
        return Err(invalid("the env is larger than 128 KiB"));
    }
    Ok(json)
}

/// What a list is asked with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    /// Another organisation than the personal one.
    org: Option<OrgId>,
    /// Those too that were deleted or whose time was up.
    #[serde(default)]
    all: bool,
}

/// An organisation's weavers.
#[utoipa::path(get, path = "/api/weavers", tag = "weavers",
    params(("org" = Option<String>, Query, description = "another organisation than the personal one"),
           ("all" = Option<bool>, Query, description = "deleted and expired ones too")),
    responses((status = 200, body = Vec<Weaver>), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn list(
    State(app): State<AppState>,
    caller: UserCaller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<Json<Vec<Weaver>>> {
    let Query(query) = query.map_err(|error| invalid(error.body_text()))?;
    let rows = app.store.weavers_of(organisation(&caller, query.org)?).await?;
    let shown = rows.iter().filter(|row| query.all || !is_removed(row));
    Ok(Json(shown.map(|row| show(row, &app)).collect()))
}

/// A weaver.
#[utoipa::path(get, path = "/api/weavers/{id}", tag = "weavers", params(("id" = String, Path, description = "id, unique prefix or name")),
    responses((status = 200, body = Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn get(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
) -> Answer<Json<Weaver>> {
    let row = find_present(&app, &caller, &reference).await?;
    Ok(Json(show(&row, &app)))
}

/// Ends a weaver at once, and removes its data.
#[utoipa::path(delete, path = "/api/weavers/{id}", tag = "weavers", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn delete(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
) -> Answer<StatusCode> {
    let row = find(&app, &caller, &reference).await?;
    if is_removed(&row) {
        return Ok(StatusCode::NO_CONTENT); // as if this were the first time
    }
    reconcile::remove(&app, row.id, EndedBy::User, format!("{} deleted it", caller.user.name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Moves a weaver's deadline.
#[utoipa::path(post, path = "/api/weavers/{id}/extend", tag = "weavers", params(("id" = String, Path)), request_body = ExtendWeaver,
    responses((status = 200, body = Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn extend(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    Body(request): Body<ExtendWeaver>,
) -> Answer<Json<Weaver>> {
    let found = find_live(&app, &caller, &reference).await?;
    let more = lifetime(request.hours)?;
    let last = found.created_at + SignedDuration::from_secs_f64(MAX_LIFETIME_HOURS * 3600.0);
    let mut too_far = false;
    let change = |row: &mut WeaverRow| {
        let moved = row.expires_at + more;
        too_far = moved > last;
        if !too_far && row.ended_at.is_none() {
            row.expires_at = moved;
        }
        !too_far
    };
    let row = app.store.change_weaver(found.id, change).await?.unwrap_or(found);
    if too_far {
        return Err(Problem::new(
            ErrorCode::InvalidLifetime,
            format!("no weaver lives longer than {MAX_LIFETIME_HOURS} hours"),
        )
        .hint(format!("this one can be extended until {last}")));
    }
    app.store.move_grants(row.id, row.expires_at).await?;
    app.relay.load(&app.store).await?;
    app.events
        .write(row.id, EventKind::Extended, format!("{} moved its end to {}", caller.user.name, row.expires_at))
        .await;
    announce_deadline(&app.agents, &row);
    Ok(Json(show(&row, &app)))
}

fn announce_deadline(agents: &Hub, row: &WeaverRow) {
    // An agent that is not connected is told when it is.
    agents.send(row.id, loom_api::agent::ServerMessage::Deadline { expires_at: row.expires_at });
}

/// Whether a weaver was deleted or its time was up: then it is no longer shown.
fn is_removed(row: &WeaverRow) -> bool {
    matches!(row.ended_by, Some(EndedBy::User | EndedBy::Deadline))
}

/// The weaver that a caller means: by id, by a unique beginning of one, or by name. Others' weavers are not found.
pub(crate) async fn find(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<WeaverRow> {
    let unknown = || {
        let shown: String = reference.chars().take(64).collect();
        Problem::new(ErrorCode::WeaverNotFound, format!("there is no weaver {shown:?}"))
            .hint("loom ps lists those there are")
    };
    if let Ok(id) = reference.parse() {
        let row = app.store.weaver(id).await?;
        return row.filter(|row| caller.is_in(row.org_id)).ok_or_else(unknown);
    }
    let mut rows = Vec::new();
    for organisation in &caller.organisations {
        rows.extend(app.store.weavers_of(organisation.id).await?);
    }
    // The newest of a name is meant; an ended one only when no live one has it.
    let named = rows.iter().filter(|row| row.name.as_deref() == Some(reference));
    if let Some(row) = named.max_by_key(|row| (row.ended_at.is_none(), row.created_at)) {
        return Ok(row.clone());
    }
    let prefix = reference.strip_prefix("W-").unwrap_or(reference).to_ascii_lowercase();
    if prefix.len() < SHORTEST_PREFIX {
        return Err(unknown());
    }
    let mut fitting = rows.into_iter().filter(|row| !is_removed(row) && row.id.uuid().to_string().starts_with(&prefix));
    match (fitting.next(), fitting.next()) {
        (Some(row), None) => Ok(row),
        (None, _) => Err(unknown()),
        (Some(one), Some(other)) => Err(Problem::new(
            ErrorCode::WeaverAmbiguous,
            format!("{reference} could be {}, {} or others", one.id, other.id),
        )
        .hint("type more of the id")),
    }
}

/// The same, for what needs a weaver that was not removed.
pub(crate) async fn find_present(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<WeaverRow> {
    let row = find(app, caller, reference).await?;
    if is_removed(&row) { Err(gone(&row)) } else { Ok(row) }
}

/// The same, for what needs a weaver that has not ended.
pub(crate) async fn find_live(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<WeaverRow> {
    let row = find(app, caller, reference).await?;
    if row.ended_at.is_some() { Err(gone(&row)) } else { Ok(row) }
}

/// The same, for what needs the main program running.
pub(crate) async fn find_running(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<WeaverRow> {
    let row = find_live(app, caller, reference).await?;
    if row.status == WeaverStatus::Running {
        return Ok(row);
    }
    let reason = row.reason.map(|reason| format!(": {reason}")).unwrap_or_default();
    Err(Problem::new(ErrorCode::WeaverNotReady, format!("{} is {}{reason}", row.id, row.status))
        .hint("loom events ID -f shows how far it is"))
}

/// That a weaver has ended, and why.
pub(crate) fn gone(row: &WeaverRow) -> Problem {
    let reason = row.reason.as_deref().unwrap_or("it has ended");
    Problem::new(ErrorCode::WeaverGone, format!("{} is gone: {reason}", row.id)).hint("make another: loom new")
}

/// The digest in the name of an image, if it has one.
fn digest(image: &str) -> Option<String> {
    image.split_once('@').map(|(_, digest)| digest.to_owned())
}

/// A weaver as the API shows it.
pub(crate) fn show(row: &WeaverRow, app: &AppState) -> Weaver {
    let now = Timestamp::now();
    let hours = |duration: SignedDuration| (duration.as_secs_f64() / 3600.0).max(0.0);
    let agent = app.agents.info(row.id);
    let pod = app.provisioner.pod(row.id).unwrap_or_default();
    Weaver {
        id: row.id,
        name: row.name.clone(),
        org_id: row.org_id,
        owner_id: row.owner_id,
        image: row.image.clone(),
        repo: row.repo.clone(),
        branch: row.branch.clone(),
        command: row.command.clone(),
        status: row.status,
        reason: row.reason.clone(),
        created_at: row.created_at,
        lifetime_hours: hours(row.expires_at.duration_since(row.created_at)),
        expires_at: row.expires_at,
        age_hours: hours(now.duration_since(row.created_at)),
        remaining_hours: hours(row.expires_at.duration_since(now)),
        pod_name: row.id.pod_name(),
        pod_phase: pod.phase,
        pod_ip: pod.ip,
        node: pod.node,
        image_digest: row.pinned_image.as_deref().and_then(digest).or(pod.image_digest),
        exit_code: row.exit_code,
        resources: row.resources,
        warnings: app.provisioner.warnings().to_vec(),
        agent,
    }
}
