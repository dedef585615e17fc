-- Tokens have a kind, a life and a last use. The table is made anew because a number must never be used twice: what
-- lives by a token knows it by its number.
CREATE TABLE new_tokens (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    hash         TEXT NOT NULL UNIQUE,
    name         TEXT NOT NULL,
    kind         TEXT NOT NULL,                -- 'sign-in', 'login', 'api' or 'agent'
    user_id      TEXT REFERENCES users (id),   -- a user's token
    weaver_id    TEXT REFERENCES weavers (id), -- or an agent's
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    last_used_at BIGINT
);
INSERT INTO new_tokens (id, hash, name, kind, user_id, weaver_id, created_at, expires_at)
    SELECT id, hash, name,
        CASE
            WHEN weaver_id IS NOT NULL THEN 'agent'
            WHEN name = 'first sign-in' THEN 'sign-in'
            WHEN name = 'loom login' THEN 'login'
            ELSE 'api'
        END,
        user_id, weaver_id, created_at,
        CASE WHEN name = 'loom login' AND weaver_id IS NULL THEN created_at + 7776000000 ELSE expires_at END -- 90 days
    FROM tokens;
DROP TABLE tokens;
ALTER TABLE new_tokens RENAME TO tokens;
CREATE INDEX tokens_by_user ON tokens (user_id);
CREATE INDEX tokens_by_expiry ON tokens (expires_at) WHERE expires_at IS NOT NULL;

-- A removed user's row stays, because weavers and events name it.
ALTER TABLE users ADD COLUMN suspended_at BIGINT;
ALTER TABLE users ADD COLUMN removed_at BIGINT;

-- A grant lives no longer than the token that it was made with. One whose token is gone waits to be taken back.
ALTER TABLE grants ADD COLUMN token_id BIGINT REFERENCES tokens (id) ON DELETE SET NULL;
CREATE INDEX grants_by_token ON grants (token_id);

-- Grows whenever a token, a user or a membership loses its rights, so that a running server notices.
CREATE TABLE identity_revision (number BIGINT NOT NULL);
INSERT INTO identity_revision (number) VALUES (0);
