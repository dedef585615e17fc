-- Times are milliseconds since 1970 (UTC), ids are their text form, keys are base64, hashes are hexadecimal SHA-256.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE users (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

CREATE TABLE organisations (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    owner_id   TEXT REFERENCES users (id), -- set for a personal organisation
    created_at BIGINT NOT NULL
);

CREATE TABLE memberships (
    org_id  TEXT NOT NULL REFERENCES organisations (id),
    user_id TEXT NOT NULL REFERENCES users (id),
    PRIMARY KEY (org_id, user_id)
);

CREATE TABLE tokens (
    id         INTEGER PRIMARY KEY,
    hash       TEXT NOT NULL UNIQUE,
    name       TEXT NOT NULL,
    user_id    TEXT REFERENCES users (id),   -- a user's token
    weaver_id  TEXT REFERENCES weavers (id), -- or an agent's
    created_at BIGINT NOT NULL,
    expires_at BIGINT
);

CREATE TABLE device_logins (
    device_hash TEXT PRIMARY KEY,
    user_hash   TEXT NOT NULL UNIQUE,
    client_name TEXT NOT NULL,
    expires_at  BIGINT NOT NULL,
    polled_at   BIGINT,
    denied      BIGINT NOT NULL DEFAULT 0,
    user_id     TEXT REFERENCES users (id) -- who approved
);

CREATE TABLE weavers (
    id             TEXT PRIMARY KEY,
    version        BIGINT NOT NULL DEFAULT 0, -- compare-and-swap
    name           TEXT,
    org_id         TEXT NOT NULL REFERENCES organisations (id),
    owner_id       TEXT NOT NULL REFERENCES users (id),
    image          TEXT NOT NULL,
    repo           TEXT,
    branch         TEXT,
    command        TEXT,                      -- JSON array
    sealed_env     BLOB NOT NULL,
    cpu_millicores BIGINT NOT NULL,
    memory_mb      BIGINT NOT NULL,
    created_at     BIGINT NOT NULL,
    expires_at     BIGINT NOT NULL,
    wanted         BIGINT NOT NULL DEFAULT 1, -- whether there should be a pod
    status         TEXT NOT NULL,
    reason         TEXT,
    exit_code      BIGINT,
    tail           BLOB,                      -- the end of the main program's output
    ended_at       BIGINT,
    ended_by       TEXT,                      -- 'user', 'deadline' or 'itself'
    address        TEXT NOT NULL UNIQUE,      -- inside the tunnel
    agent_version  TEXT,
    wireguard_key  TEXT UNIQUE,
    candidates     TEXT NOT NULL DEFAULT '[]'
);
CREATE UNIQUE INDEX weavers_live_names ON weavers (org_id, name) WHERE name IS NOT NULL AND ended_at IS NULL;
CREATE INDEX weavers_by_org ON weavers (org_id, created_at);

CREATE TABLE devices (
    public_key TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL REFERENCES users (id),
    address    TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

CREATE TABLE grants (
    weaver_id  TEXT NOT NULL REFERENCES weavers (id),
    public_key TEXT NOT NULL REFERENCES devices (public_key) ON DELETE CASCADE,
    candidates TEXT NOT NULL,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (weaver_id, public_key)
);

CREATE TABLE events (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    weaver_id TEXT NOT NULL REFERENCES weavers (id),
    at        BIGINT NOT NULL,
    kind      TEXT NOT NULL,
    message   TEXT NOT NULL
);
CREATE INDEX events_by_weaver ON events (weaver_id, id);

CREATE TABLE idempotency_keys (
    user_id    TEXT NOT NULL REFERENCES users (id),
    key        TEXT NOT NULL,
    body_hash  TEXT NOT NULL,
    weaver_id  TEXT NOT NULL REFERENCES weavers (id),
    created_at BIGINT NOT NULL,
    PRIMARY KEY (user_id, key)
);
