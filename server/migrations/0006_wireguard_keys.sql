-- One table of WireGuard keys, whoever holds them: a key is a place on the relay, and nobody gets another's.
CREATE TABLE wireguard_keys (
    public_key TEXT PRIMARY KEY,
    user_id    TEXT REFERENCES users (id),          -- a device's
    weaver_id  TEXT UNIQUE REFERENCES weavers (id), -- or an agent's
    CHECK ((user_id IS NULL) <> (weaver_id IS NULL))
);
INSERT INTO wireguard_keys (public_key, weaver_id)
    SELECT wireguard_key, id FROM weavers WHERE wireguard_key IS NOT NULL AND ended_at IS NULL;
INSERT INTO wireguard_keys (public_key, user_id)
    SELECT public_key, user_id FROM devices WHERE public_key NOT IN (SELECT public_key FROM wireguard_keys);
DELETE FROM devices WHERE public_key NOT IN (SELECT public_key FROM wireguard_keys WHERE user_id IS NOT NULL);

-- Devices that nobody uses any more are forgotten.
ALTER TABLE devices ADD COLUMN last_used_at BIGINT NOT NULL DEFAULT 0;
UPDATE devices SET last_used_at = created_at;
CREATE INDEX devices_by_user ON devices (user_id);
CREATE INDEX devices_by_use ON devices (last_used_at);
