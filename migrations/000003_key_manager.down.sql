DROP FUNCTION rescind.trim_issued_tokens(integer), rescind.trim_client_assertions(integer);
DROP TABLE rescind.endings;
DROP TABLE rescind.issued_since;
DROP TABLE rescind.issued_tokens;
ALTER TABLE rescind.signing_keys DROP COLUMN revoked_at;
ALTER TABLE rescind.applications DROP COLUMN self_contained;
DROP TABLE rescind.client_assertions;
-- The version before knows no other way in for these clients: they have none, and keep their rows.
ALTER TABLE rescind.clients DROP CONSTRAINT clients_jwks_check;
UPDATE rescind.clients SET auth_method = 'client_secret_basic', jwks = NULL WHERE auth_method = 'private_key_jwt';
ALTER TABLE rescind.clients
    DROP COLUMN resource_audiences, DROP COLUMN token_typ, DROP COLUMN grant_types, DROP COLUMN jwks,
    DROP CONSTRAINT clients_auth_method_check,
    ADD CONSTRAINT clients_auth_method_check CHECK (auth_method IN ('client_secret_basic', 'client_secret_post', 'none'));
