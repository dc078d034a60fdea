-- The key manager: clients that prove themselves with a key, resource servers, an
-- issuer of our own for each tenant, keys that are withdrawn, tokens that are remembered.

-- What is altered is locked first, in the order in which the statements of the version
-- before take it: one lock after the other, as ALTER TABLE takes them, would deadlock with them.
LOCK TABLE rescind.clients, rescind.applications, rescind.signing_keys IN ACCESS EXCLUSIVE MODE;

ALTER TABLE rescind.clients
    DROP CONSTRAINT clients_auth_method_check,
    ADD CONSTRAINT clients_auth_method_check
        CHECK (auth_method IN ('client_secret_basic', 'client_secret_post', 'private_key_jwt', 'none')),
    ADD COLUMN jwks jsonb, -- a JWK set of public keys, for private_key_jwt
    ADD CONSTRAINT clients_jwks_check CHECK ((auth_method = 'private_key_jwt') = (jwks IS NOT NULL)),
    ADD COLUMN grant_types text[] NOT NULL DEFAULT '{client_credentials}',
    ADD COLUMN token_typ text NOT NULL DEFAULT 'at+jwt' CHECK (token_typ IN ('at+jwt', 'JWT')),
    -- The client is the resource server of these: it may introspect tokens that are for one of them.
    ADD COLUMN resource_audiences text[] NOT NULL DEFAULT '{}';

-- Assertions of clients that were used, until they have expired: each counts once.
CREATE TABLE rescind.client_assertions (
    client_id  text COLLATE "C" NOT NULL,
    jti        bytea NOT NULL CHECK (octet_length(jti) = 32), -- SHA-256
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (client_id, jti)
);
CREATE INDEX client_assertions_expires_at ON rescind.client_assertions (expires_at);

ALTER TABLE rescind.applications
    ADD COLUMN self_contained boolean NOT NULL DEFAULT false; -- tokens carry what gateways would look up

ALTER TABLE rescind.signing_keys
    ADD COLUMN revoked_at timestamptz; -- withdrawn: neither used nor published

-- Tokens that were issued, for as long as they can live, where the service is told to
-- remember them. n is the order in which they were issued.
CREATE TABLE rescind.issued_tokens (
    n              bigint GENERATED ALWAYS AS IDENTITY,
    jti            uuid PRIMARY KEY,
    key_manager_id integer NOT NULL, -- whose issuer it was; no reference: it may be gone before the token
    client_id      text COLLATE "C" NOT NULL,
    subject        text COLLATE "C" NOT NULL,
    exp            bigint NOT NULL -- Unix seconds
);
-- Of two that cost the same the planner takes the one that was made last: without statistics,
-- that must be the one that finds less.
CREATE INDEX issued_tokens_key_manager ON rescind.issued_tokens (key_manager_id, n);
CREATE INDEX issued_tokens_client ON rescind.issued_tokens (key_manager_id, client_id, n);
CREATE INDEX issued_tokens_subject ON rescind.issued_tokens (key_manager_id, subject, n);
CREATE INDEX issued_tokens_exp ON rescind.issued_tokens (exp);

-- Since when all issued tokens are remembered; no row: they are not.
CREATE TABLE rescind.issued_since (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    since    timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Revocations of more than one token, whose remembered tokens, up to one, are still to be
-- revoked one by one: gateways that know no others are told of each.
CREATE TABLE rescind.endings (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind        text COLLATE "C" NOT NULL CHECK (kind IN ('client', 'subject', 'tenant')),
    iss         text COLLATE "C" NOT NULL,
    ident       text COLLATE "C" NOT NULL,
    tenant_id   integer NOT NULL,
    last_n      bigint NOT NULL, -- those issued later live
    reason      text NOT NULL,
    traceparent text NOT NULL
);

-- trim_issued_tokens removes up to max_rows remembered tokens that no gateway accepts any
-- more, trim_client_assertions as many assertions that have expired.
CREATE FUNCTION rescind.trim_issued_tokens(max_rows integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    removed integer;
BEGIN
    DELETE FROM rescind.issued_tokens WHERE ctid = ANY (ARRAY(
        SELECT i.ctid FROM rescind.issued_tokens i
        WHERE i.exp < extract(epoch FROM clock_timestamp())::bigint - 120
        ORDER BY i.exp LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END
$$;

CREATE FUNCTION rescind.trim_client_assertions(max_rows integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    removed integer;
BEGIN
    DELETE FROM rescind.client_assertions WHERE ctid = ANY (ARRAY(
        SELECT a.ctid FROM rescind.client_assertions a
        WHERE a.expires_at < clock_timestamp()
        ORDER BY a.expires_at LIMIT max_rows FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END
$$;

REVOKE ALL ON FUNCTION rescind.trim_issued_tokens(integer), rescind.trim_client_assertions(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION rescind.trim_issued_tokens(integer), rescind.trim_client_assertions(integer) TO rescind_service;
GRANT SELECT, INSERT ON rescind.client_assertions TO rescind_service;
GRANT SELECT, INSERT, DELETE ON rescind.issued_tokens, rescind.issued_since, rescind.endings TO rescind_service;
