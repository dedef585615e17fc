-- A weaver's environment may hold passwords, and nobody needs it after the weaver's end.
INSERT INTO settings (name, value)
    SELECT 'vacuum', '' WHERE EXISTS (SELECT 1 FROM environments e JOIN weavers w ON w.id = e.weaver_id WHERE w.ended_at IS NOT NULL)
    ON CONFLICT DO NOTHING;
DELETE FROM environments WHERE weaver_id IN (SELECT id FROM weavers WHERE ended_at IS NOT NULL);
