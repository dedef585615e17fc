-- What a weaver's image turned out to be when its pod was first made.
ALTER TABLE weavers ADD COLUMN pinned_image  TEXT; -- the image by its digest
ALTER TABLE weavers ADD COLUMN image_command TEXT; -- its ENTRYPOINT and CMD, a JSON array
