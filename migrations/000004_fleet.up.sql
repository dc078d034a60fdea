-- The fleet: which gateways there are, and what each was last known to have applied.

CREATE TABLE rescind.gateways (
    id         text COLLATE "C" PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 128),
    account    text COLLATE "C" NOT NULL, -- who reported it first; nobody else may. No reference: it may be gone
    tenant     text COLLATE "C" NOT NULL, -- the domain of the account's tenant, and what else it sees
    sees       text[] NOT NULL DEFAULT '{}',
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen  timestamptz NOT NULL DEFAULT clock_timestamp(), -- up to a minute too early
    report     jsonb NOT NULL, -- the last one that was written down
    canary_url text NOT NULL DEFAULT '',
    canary     jsonb -- the last result
);

-- What each process knows of the gateways that report to it, for the others. It is written when one of
-- them asks, and is worth nothing after a crash.
CREATE UNLOGGED TABLE rescind.fleet_processes (
    id       uuid PRIMARY KEY,
    seen     timestamptz NOT NULL DEFAULT clock_timestamp(),
    asked    bigint NOT NULL DEFAULT 0, -- the last question that body answers
    gateways bytea -- compressed
);

GRANT SELECT, INSERT, UPDATE, DELETE ON rescind.gateways, rescind.fleet_processes TO rescind_service;
