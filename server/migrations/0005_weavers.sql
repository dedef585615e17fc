-- A weaver's life is `status`, `reason`, `exit_code`, `ended_at` and `ended_by` together; whether there should be a
-- pod follows from it, and one writer at a time needs no version to compare.
ALTER TABLE weavers DROP COLUMN wanted;
ALTER TABLE weavers DROP COLUMN version;

-- What lists do not read stands in tables of its own.
CREATE TABLE environments (
    weaver_id TEXT PRIMARY KEY REFERENCES weavers (id),
    sealed    BLOB NOT NULL
);
INSERT INTO environments (weaver_id, sealed) SELECT id, sealed_env FROM weavers;
ALTER TABLE weavers DROP COLUMN sealed_env;

CREATE TABLE outputs (
    weaver_id TEXT PRIMARY KEY REFERENCES weavers (id),
    tail      BLOB NOT NULL -- the end of what the main program wrote
);
INSERT INTO outputs (weaver_id, tail) SELECT id, tail FROM weavers WHERE tail IS NOT NULL;
ALTER TABLE weavers DROP COLUMN tail;

-- Lists are paged by id, newest first: ids are UUIDv7, which sort by time.
DROP INDEX weavers_by_org;
CREATE INDEX weavers_by_org ON weavers (org_id, id);
CREATE INDEX weavers_by_name ON weavers (org_id, name) WHERE name IS NOT NULL;
CREATE INDEX weavers_live ON weavers (id) WHERE ended_at IS NULL;
CREATE INDEX weavers_live_by_owner ON weavers (owner_id) WHERE ended_at IS NULL;
CREATE INDEX weavers_ended ON weavers (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX idempotency_keys_by_weaver ON idempotency_keys (weaver_id);
CREATE INDEX tokens_by_weaver ON tokens (weaver_id) WHERE weaver_id IS NOT NULL;
CREATE INDEX grants_by_key ON grants (public_key);
