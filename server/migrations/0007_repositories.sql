-- Repositories' URLs with a user name or password in them, recorded before such were refused, lose what stands before
-- their last @. So do the events and reasons that may have repeated it.
CREATE TABLE with_credentials (
    weaver_id TEXT PRIMARY KEY,
    url       TEXT NOT NULL,
    kept      TEXT NOT NULL, -- what the URL is without them
    login     TEXT NOT NULL, -- user name and password
    secret    TEXT NOT NULL  -- the password, or a user name long enough to be a token; empty when it is neither
);

-- As in api/repository.rs, only HOST or HOST:PORT may stand between :// and the path. A password can hold a slash, so the
-- last @ counts wherever it is. Without one, as in a percent-encoded form, nothing says where the host begins.
WITH urls AS (
    SELECT id, repo, substr(repo, 1, instr(repo, '://') + 2) AS scheme, substr(repo, instr(repo, '://') + 3) AS rest
    FROM weavers WHERE instr(repo, '://') > 0
), authorities AS (
    SELECT *, substr(rest, 1, instr(replace(replace(replace(rest, '?', '/'), '#', '/'), '\', '/') || '/', '/') - 1) AS authority
    FROM urls
), suspects AS (
    -- rtrim takes away every character that is not @, from the end on.
    SELECT *, length(rtrim(rest, replace(rest, '@', ''))) AS last_at
    FROM authorities
    WHERE authority GLOB '*[@%]*'
       OR (authority GLOB '[[]*' AND substr(authority, instr(authority, ']') + 1) GLOB '*[^:0-9]*')
       OR (authority NOT GLOB '[[]*' AND substr(authority, instr(authority || ':', ':') + 1) GLOB '*[^0-9]*')
), logins AS (
    SELECT id, repo, scheme, rest, last_at,
           CASE last_at WHEN 0 THEN authority ELSE substr(rest, 1, last_at - 1) END AS login
    FROM suspects
)
INSERT INTO with_credentials (weaver_id, url, kept, login, secret)
    SELECT id, repo, scheme || CASE last_at WHEN 0 THEN 'removed' ELSE substr(rest, last_at + 1) END, login,
           CASE WHEN instr(login, ':') > 0 AND length(substr(login, instr(login, ':') + 1)) >= 4
                THEN substr(login, instr(login, ':') + 1)
                WHEN instr(login, ':') = 0 AND length(login) >= 16 THEN login
                ELSE '' END
    FROM logins;

UPDATE events SET message = (
    SELECT replace(replace(replace(message, url, kept), login || '@', ''), secret, '…')
    FROM with_credentials w WHERE w.weaver_id = events.weaver_id
) WHERE weaver_id IN (SELECT weaver_id FROM with_credentials);
UPDATE weavers SET
    repo = (SELECT kept FROM with_credentials w WHERE w.weaver_id = weavers.id),
    reason = (
        SELECT replace(replace(replace(reason, url, kept), login || '@', ''), secret, '…')
        FROM with_credentials w WHERE w.weaver_id = weavers.id
    )
    WHERE id IN (SELECT weaver_id FROM with_credentials);

-- The hash of the request is of the URL, too. The same request would be refused now.
DELETE FROM idempotency_keys WHERE weaver_id IN (SELECT weaver_id FROM with_credentials);

-- The file's free space still has all of it: the server rewrites the file when it finds this.
INSERT INTO settings (name, value) SELECT 'vacuum', '' WHERE EXISTS (SELECT 1 FROM with_credentials);
DROP TABLE with_credentials;
