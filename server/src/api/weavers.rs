//! Making, listing, showing, extending and deleting weavers.

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode},
};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    ErrorCode, OrgId, WeaverId,
    weaver::{
        self as shown, CreateWeaver, DEFAULT_LIFETIME_HOURS, EventKind, ExtendWeaver, MAX_LIFETIME_HOURS, MAX_LIST,
        WeaverStatus,
    },
};
use serde::Deserialize;

use super::{auth::UserCaller, body::Body, extract::Path, repository};
use crate::{
    fault,
    names::is_dns_label,
    problem::{Answer, Problem},
    state::AppState,
    store::{Added, Idempotency, Limit, Limits, MAX_FITTING, Page, Transition},
    streams::StreamError,
    weaver::{Event, Life, NewWeaver, NotExtended, Weaver},
};

/// The fewest characters of a UUID that may stand for it.
const MIN_PREFIX: usize = 4;
/// The most of an idempotency key, and of an argument list and an environment as JSON, in bytes.
const MAX_KEY: usize = 200;
const MAX_COMMAND: usize = 64 << 10;
const MAX_ENV: usize = 128 << 10;
/// The longest name of an image.
const MAX_IMAGE: usize = 2048;

fn invalid(message: impl Into<String>) -> Problem {
    Problem::new(ErrorCode::InvalidRequest, message)
}

/// Makes a weaver.
#[utoipa::path(post, path = "/api/weavers", tag = "weavers", request_body = CreateWeaver,
    params(("Idempotency-Key" = Option<String>, Header, description = "tries with the same key make one weaver")),
    responses((status = 201, body = shown::Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn create(
    State(app): State<AppState>,
    caller: UserCaller,
    headers: HeaderMap,
    Body(request): Body<CreateWeaver>,
) -> Answer<(StatusCode, Json<shown::Weaver>)> {
    let key = idempotency_key(&headers)?;
    // The request may hold passwords in its environment.
    let body_hash = app.secrets.fingerprint(&serde_json::to_string(&request).map_err(anyhow::Error::from)?);
    let idempotency = key.map(|key| Idempotency { key, body_hash: &body_hash });
    let new = plan(&app, &caller, request)?;
    let created = Event::new(EventKind::Created, format!("{} made it from {}", caller.user.name, new.weaver.image));
    let limits = Limits { of_organisation: app.config.max_weavers, of_user: app.config.max_weavers_per_user };
    match app.store.add_weaver(&new, idempotency, limits, &created).await? {
        Added::New(weaver) => {
            fault::point("weaver-recorded");
            app.reconciler.added(weaver.id, &created).await;
            Ok((StatusCode::CREATED, Json(show(&weaver, &app))))
        }
        Added::Earlier(weaver) => Ok((StatusCode::CREATED, Json(show(&weaver, &app)))),
        Added::KeyUsed => {
            Err(Problem::new(ErrorCode::IdempotencyConflict, "this Idempotency-Key was used for another request"))
        }
        Added::NameTaken => Err(Problem::new(
            ErrorCode::NameTaken,
            format!("there is a weaver named {} already", new.weaver.name.unwrap_or_default()),
        )
        .hint("choose another --name, or delete the other weaver")),
        Added::DiskFull => Err(Problem::new(ErrorCode::Unavailable, "the server's disk is full")
            .hint("weavers can still be deleted; tell the server's operator")),
        Added::TooMany(limit) => {
            let message = match limit {
                Limit::Organisation => {
                    format!("the organisation has {} weavers, as many as it may", limits.of_organisation)
                }
                Limit::User => format!("you have {} weavers, as many as one user may", limits.of_user),
            };
            Err(Problem::new(ErrorCode::TooManyWeavers, message)
                .hint("delete one that is no longer needed: loom ps, loom delete ID"))
        }
    }
}

fn idempotency_key(headers: &HeaderMap) -> Answer<Option<&str>> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    match key.to_str() {
        Ok(key) if (1..=MAX_KEY).contains(&key.len()) => Ok(Some(key)),
        _ => Err(invalid(format!("Idempotency-Key must be 1 to {MAX_KEY} visible characters"))),
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
    if let Some(name) = request.name.as_deref().filter(|name| looks_like_an_id(name)) {
        return Err(invalid(format!("the name {name:?} could be taken for the beginning of a weaver's id"))
            .hint(format!("begin it with a word, such as my-{name}")));
    }
    let image = request.image.unwrap_or_else(|| app.config.default_image.clone());
    check_image(app, &image)?;
    repository::check(request.repo.as_deref(), request.branch.as_deref(), |path| app.provisioner.accepts_file(path))?;
    check_command(request.command.as_deref())?;
    let env = check_env(&request.env)?;
    let resources = app.config.resources.choose(request.resources).map_err(|error| {
        let max = app.config.resources.max;
        invalid(error.to_string())
            .hint(format!("ask for at most {} thousandths of a core and {} MiB", max.cpu_millicores, max.memory_mb))
    })?;
    let id = WeaverId::generate();
    let created_at = Timestamp::now();
    let weaver = Weaver {
        id,
        name: request.name,
        org_id,
        owner_id: caller.user.id,
        image,
        repo: request.repo,
        branch: request.branch,
        command: request.command,
        resolved: None,
        resources,
        created_at,
        expires_at: created_at + lifetime(request.lifetime_hours.unwrap_or(DEFAULT_LIFETIME_HOURS))?,
        life: Life::Pending { waits_for: None },
        address: app.store.weaver_address(id),
        agent: None,
    };
    Ok(NewWeaver { weaver, sealed_env: app.secrets.seal(&id.to_string(), &env) })
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

/// Whether this is a name as in the OCI distribution specification: `[host[:port]/]path[:tag][@sha256:digest]`.
fn is_image(name: &str) -> bool {
    let is_part = |part: &str| {
        part.starts_with(|first: char| first.is_ascii_alphanumeric())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let is_lower = |part: &str| !part.bytes().any(|byte| byte.is_ascii_uppercase());
    let (reference, digest) =
        name.split_once('@').map_or((name, None), |(reference, digest)| (reference, Some(digest)));
    let (path, last) = reference.rsplit_once('/').map_or((None, reference), |(path, last)| (Some(path), last));
    let (last, tag) = last.split_once(':').map_or((last, None), |(last, tag)| (last, Some(tag)));
    let (host, middle) = path.map_or((None, None), |path| {
        path.split_once('/').map_or((Some(path), None), |(host, middle)| (Some(host), Some(middle)))
    });
    let is_host = |host: &str| {
        let (host, port) = host.split_once(':').map_or((host, None), |(host, port)| (host, Some(port)));
        is_part(host) && port.is_none_or(|port| port.parse::<u16>().is_ok())
    };
    name.len() <= MAX_IMAGE
        && host.is_none_or(is_host)
        && middle.is_none_or(|middle| middle.split('/').all(|part| is_part(part) && is_lower(part)))
        && is_part(last)
        && is_lower(last)
        // A tag may begin with `_`, too.
        && tag.is_none_or(|tag| tag.len() <= 128 && is_part(tag.strip_prefix('_').unwrap_or(tag)))
        && digest.is_none_or(|digest| {
            digest
                .strip_prefix("sha256:")
                .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
        })
}

fn check_image(app: &AppState, image: &str) -> Answer<()> {
    if !is_image(image) {
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
    // As it is kept and listed: many empty words are long, too.
    let json = serde_json::to_string(command).map_err(anyhow::Error::from)?;
    if command.first().is_none_or(String::is_empty)
        || json.len() > MAX_COMMAND
        || command.iter().any(|word| word.contains('\0'))
    {
        return Err(invalid("the command must name a program, hold no NUL, and be at most 64 KiB as JSON"));
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
    if json.len() > MAX_ENV {
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
    /// Only older ones than this: the last one of the page before.
    before: Option<WeaverId>,
    limit: Option<u32>,
}

/// An organisation's weavers, newest first.
#[utoipa::path(get, path = "/api/weavers", tag = "weavers",
    params(("org" = Option<String>, Query, description = "another organisation than the personal one"),
           ("all" = Option<bool>, Query, description = "deleted and expired ones too"),
           ("before" = Option<String>, Query, description = "only older ones than this id: the last one of the page before"),
           ("limit" = Option<u32>, Query, description = "the most that are listed, 1 to 1000 (and 1000 when left out); fewer mean that there are no more")),
    responses((status = 200, body = Vec<shown::Weaver>), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn list(
    State(app): State<AppState>,
    caller: UserCaller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Answer<Json<Vec<shown::Weaver>>> {
    let Query(query) = query.map_err(|error| invalid(error.body_text()))?;
    let limit = query.limit.unwrap_or(MAX_LIST);
    if !(1..=MAX_LIST).contains(&limit) {
        return Err(invalid(format!("the limit must be 1 to {MAX_LIST}, not {limit}")));
    }
    let page = Page { with_removed: query.all, before: query.before, limit };
    let weavers = app.store.weavers_of(organisation(&caller, query.org)?, page).await?;
    Ok(Json(weavers.iter().map(|weaver| show(weaver, &app)).collect()))
}

/// A weaver.
#[utoipa::path(get, path = "/api/weavers/{id}", tag = "weavers", params(("id" = String, Path, description = "id, unique prefix or name")),
    responses((status = 200, body = shown::Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn get(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
) -> Answer<Json<shown::Weaver>> {
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
    // One that was deleted before is deleted as if for the first time.
    app.reconciler.delete(row.id, &caller.user.name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Moves a weaver's deadline.
#[utoipa::path(post, path = "/api/weavers/{id}/extend", tag = "weavers", params(("id" = String, Path)), request_body = ExtendWeaver,
    responses((status = 200, body = shown::Weaver), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn extend(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    Body(request): Body<ExtendWeaver>,
) -> Answer<Json<shown::Weaver>> {
    let found = find_live(&app, &caller, &reference).await?;
    let more = lifetime(request.hours)?;
    match app.admission.extend(found.id, more, &caller.user.name).await? {
        Transition::Done(weaver, event) => {
            app.reconciler.extended(weaver.id, event).await;
            Ok(Json(show(&weaver, &app)))
        }
        Transition::Refused(_, NotExtended::TooLong { latest }) => Err(Problem::new(
            ErrorCode::InvalidLifetime,
            format!("no weaver lives longer than {MAX_LIFETIME_HOURS} hours"),
        )
        .hint(format!("this one can be extended until {latest}"))),
        Transition::Refused(weaver, NotExtended::Ended) => Err(Problem::gone(&weaver)),
        Transition::NoSuchWeaver => Err(Problem::gone(&found)),
    }
}

/// Whether a reference could be the beginning of a UUID, with or without `W-`: no name may be.
fn looks_like_an_id(text: &str) -> bool {
    let prefix = uuid_prefix(text);
    (prefix.len() >= MIN_PREFIX || prefix.len() < text.len())
        && prefix.len() <= 36
        && prefix.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

fn uuid_prefix(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    lower.strip_prefix("w-").unwrap_or(&lower).to_owned()
}

/// The weaver that a caller means: by id, by a unique beginning of one, or by name. Others' weavers are not found.
pub(crate) async fn find(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<Weaver> {
    let unknown = || {
        let shown: String = reference.chars().take(64).collect();
        Problem::new(ErrorCode::WeaverNotFound, format!("there is no weaver {shown:?}"))
            .hint("loom ps lists those there are")
    };
    if let Ok(id) = reference.parse() {
        let weaver = app.store.weaver(id).await?;
        return weaver.filter(|weaver| caller.is_in(weaver.org_id)).ok_or_else(unknown);
    }
    if let Some(weaver) = named(app.store.weavers_named(caller.user.id, reference).await?, reference)? {
        return Ok(weaver);
    }
    if !looks_like_an_id(reference) || uuid_prefix(reference).len() < MIN_PREFIX {
        return Err(unknown());
    }
    let mut fitting = app.store.weavers_beginning(caller.user.id, &uuid_prefix(reference)).await?;
    match fitting.len() {
        0 => Err(unknown()),
        1 => fitting.pop().ok_or_else(unknown),
        _ => Err(ambiguous(reference, &fitting).hint("type more of the id")),
    }
}

/// The one that a name means: one that lives, else one that ended by itself and is still listed, else the last one that
/// was removed. Where several of the same kind have the name, none of them is guessed.
fn named(weavers: Vec<Weaver>, name: &str) -> Answer<Option<Weaver>> {
    type Kind = fn(&Weaver) -> bool;
    let kinds: [Kind; 2] = [|weaver| !weaver.has_ended(), |weaver| weaver.has_ended() && !weaver.is_removed()];
    for kind in kinds {
        let fitting: Vec<Weaver> = weavers.iter().filter(|weaver| kind(weaver)).cloned().collect();
        if fitting.len() > 1 {
            return Err(ambiguous(name, &fitting).hint("name one by its id: loom ps lists them"));
        }
        if let Some(weaver) = fitting.into_iter().next() {
            return Ok(Some(weaver));
        }
    }
    let organisation = weavers.first().map(|weaver| weaver.org_id);
    if weavers.iter().any(|weaver| Some(weaver.org_id) != organisation) {
        return Err(ambiguous(name, &weavers).hint("name one by its id: loom ps --all lists them"));
    }
    Ok(weavers.into_iter().next())
}

fn ambiguous(reference: &str, fitting: &[Weaver]) -> Problem {
    let mut list: Vec<String> =
        fitting.iter().take(MAX_FITTING).map(|weaver| format!("{} ({})", weaver.id, weaver.life.status())).collect();
    if fitting.len() > MAX_FITTING {
        list.push("others".to_owned());
    }
    Problem::new(ErrorCode::WeaverAmbiguous, format!("{reference} could be {}", list.join(", ")))
}

/// What was opened, or, where that failed because the weaver has ended meanwhile, that it has.
pub(crate) async fn or_gone<T>(app: &AppState, weaver: WeaverId, opened: Result<T, StreamError>) -> Answer<T> {
    if matches!(opened, Err(StreamError::Agent(_)))
        && let Some(ended) = app.store.weaver(weaver).await?.filter(Weaver::has_ended)
    {
        return Err(Problem::gone(&ended));
    }
    Ok(opened?)
}

/// The same, for what needs a weaver that was not removed.
pub(crate) async fn find_present(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<Weaver> {
    let row = find(app, caller, reference).await?;
    if row.is_removed() { Err(Problem::gone(&row)) } else { Ok(row) }
}

/// The same, for what needs a weaver that has not ended.
pub(crate) async fn find_live(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<Weaver> {
    let row = find(app, caller, reference).await?;
    if row.has_ended() { Err(Problem::gone(&row)) } else { Ok(row) }
}

/// The same, for what needs the main program running.
pub(crate) async fn find_running(app: &AppState, caller: &UserCaller, reference: &str) -> Answer<Weaver> {
    let row = find_live(app, caller, reference).await?;
    if row.life.status() == WeaverStatus::Running {
        return Ok(row);
    }
    let reason = row.life.reason().map(|reason| format!(": {reason}")).unwrap_or_default();
    Err(Problem::new(ErrorCode::WeaverNotReady, format!("{} is {}{reason}", row.id, row.life.status()))
        .hint("loom events ID -f shows how far it is"))
}

/// The digest in the name of an image, if it has one.
fn digest(image: &str) -> Option<String> {
    image.split_once('@').map(|(_, digest)| digest.to_owned())
}

/// A weaver as the API shows it.
pub(crate) fn show(row: &Weaver, app: &AppState) -> shown::Weaver {
    let now = Timestamp::now();
    let hours = |duration: SignedDuration| (duration.as_secs_f64() / 3600.0).max(0.0);
    let agent = app.agents.info(row.id);
    let pod = app.provisioner.pod(row.id).unwrap_or_default();
    shown::Weaver {
        id: row.id,
        name: row.name.clone(),
        org_id: row.org_id,
        owner_id: row.owner_id,
        image: row.image.clone(),
        repo: row.repo.clone(),
        branch: row.branch.clone(),
        command: row.command.clone(),
        status: row.life.status(),
        reason: row.life.reason().map(ToOwned::to_owned),
        created_at: row.created_at,
        lifetime_hours: hours(row.expires_at.duration_since(row.created_at)),
        expires_at: row.expires_at,
        age_hours: hours(now.duration_since(row.created_at)),
        remaining_hours: hours(row.expires_at.duration_since(now)),
        pod_name: row.id.pod_name(),
        pod_phase: pod.phase,
        pod_ip: pod.ip,
        node: pod.node,
        image_digest: row.resolved.as_ref().and_then(|image| digest(&image.pinned)).or(pod.image_digest),
        exit_code: row.life.exit_code(),
        resources: row.resources,
        warnings: app.provisioner.warnings().to_vec(),
        agent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weaver::{Ending, tests::pending};

    #[test]
    fn names_of_images_are_told_from_what_looks_like_them() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for name in ["python", "python:3.12", "team/app:V1", "r.example:5000/a/b:_x", "LOCAL/a", &format!("a@{digest}")]
        {
            assert!(is_image(name), "{name}");
        }
        for name in [
            "",
            ":",
            "a:",
            "a:b:c",
            "a/b:c/d",
            "a:1/b:2:3",
            "h:port/a",
            "h:99999/a",
            "Python",
            "a/B/c",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a b",
            "a@sha256:0",
            "a@sha1:0",
            "a@",
            "a:b@",
            "é",
        ] {
            assert!(!is_image(name), "{name}");
        }
    }

    #[test]
    fn what_could_be_the_beginning_of_an_id_is_no_name() {
        for id in ["0192", "dead", "deadbeef", "deadbeef-", "01927f3a-1b2c", "w-0192", "w-a"] {
            assert!(looks_like_an_id(id), "{id}");
        }
        for name in ["abc", "work", "dead-beef", "cafe1x", "web", "w-work", "deadbeefs"] {
            assert!(!looks_like_an_id(name), "{name}");
        }
    }

    #[test]
    fn a_name_never_means_the_newer_one_of_another_organisation() {
        let [mut live, mut ended, other] = [pending(), pending(), pending()];
        ended.org_id = live.org_id;
        ended.ended(Timestamp::now(), &Ending::Failed { reason: "x".to_owned() }).expect("it lives");
        let find = |weavers: &[&Weaver]| named(weavers.iter().copied().cloned().collect(), "work");
        assert_eq!(find(&[&live, &ended]).expect("one lives").map(|weaver| weaver.id), Some(live.id));
        assert_eq!(find(&[&ended]).expect("one").map(|weaver| weaver.id), Some(ended.id));
        let error = find(&[&live, &other]).expect_err("two live").0;
        assert!(error.code == ErrorCode::WeaverAmbiguous && error.message.contains(&other.id.to_string()), "{error}");
        live.deleted(Timestamp::now(), "ada").expect("it lives");
        assert_eq!(find(&[&live]).expect("one").map(|weaver| weaver.id), Some(live.id));
        assert_eq!(find(&[]).expect("none"), None);
    }
}
