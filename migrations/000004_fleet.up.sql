-- The fleet: which gateways there are, and what each was last known to have applied.

CREATE TABLE rescind.gateways (
    id         text COLLATE "C" PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 128),
    account    text COLLATE "C" NOT NULL, -- who reported it first; nobody else may. No reference: it may be gone
    tenant     text COLLATE "C" NOT NULL, -- the domain of the account's tenant, and what else it sees
    sees       text[] NOT NULL DEFAULT '{}',
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen  timestamptz NOT NULL DEFAULT clock_timestamp(), -- up to a minute too early
    left_at    timestamptz, -- it said that it stops, and its id is kept for it for a while; null: it is there
    report     jsonb NOT NULL, -- the last one that was written down
    canary_url text NOT NULL DEFAULT '', -- set by people, so a gateway that is started again finds it
    canary     jsonb -- the last result
);

-- Those of an account that have left, the last ones first.
CREATE INDEX gateways_left ON rescind.gateways (account, left_at) WHERE left_at IS NOT NULL;

-- What each process knows of the gateways that report to it, for the others. It is written when one of
-- them asks, and is worth nothing after a crash.
CREATE UNLOGGED TABLE rescind.fleet_processes (
    id       uuid PRIMARY KEY,
    since    timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen     timestamptz NOT NULL DEFAULT clock_timestamp(), -- some seconds ago, or the process is gone
    asked    bigint NOT NULL DEFAULT 0, -- the last question that gateways answers
    version  bigint NOT NULL DEFAULT 0, -- of gateways, so that nobody reads the same twice
    told_at  timestamptz NOT NULL DEFAULT clock_timestamp(), -- what the ages in gateways count from
    gateways bytea -- JSON, compressed with zstd
);
-- It is compressed already.
ALTER TABLE rescind.fleet_processes ALTER COLUMN gateways SET STORAGE EXTERNAL;

-- The numbers of questions, of whichever process.
CREATE SEQUENCE rescind.fleet_questions;

GRANT SELECT, INSERT, UPDATE, DELETE ON rescind.gateways, rescind.fleet_processes TO rescind_service;
GRANT USAGE ON SEQUENCE rescind.fleet_questions TO rescind_service;
