-- Who asks: shown to the user who approves, and counted. Logins from before have a few minutes to live at most.
DELETE FROM device_logins;
ALTER TABLE device_logins ADD COLUMN client_address TEXT NOT NULL DEFAULT '';
ALTER TABLE device_logins ADD COLUMN client_network TEXT NOT NULL DEFAULT ''; -- what limits per address count by
ALTER TABLE device_logins ADD COLUMN created_at BIGINT NOT NULL DEFAULT 0;
CREATE INDEX device_logins_by_expiry ON device_logins (expires_at);
CREATE INDEX device_logins_by_network ON device_logins (client_network);
