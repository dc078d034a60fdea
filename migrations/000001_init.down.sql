-- The role stays: other databases of the server may use it.
DROP SCHEMA rescind CASCADE;
