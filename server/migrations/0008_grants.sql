-- A grant ends with its weaver: a second copy of that time could only be wrong.
ALTER TABLE grants DROP COLUMN expires_at;
