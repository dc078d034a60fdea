DROP TABLE rescind.idempotency;
ALTER TABLE rescind.accounts DROP COLUMN revoked_jwt_form, DROP COLUMN extra_tenants;
DROP TABLE rescind.subscriptions;
DROP INDEX rescind.key_mappings_key_manager, rescind.key_mappings_consumer_key;
ALTER TABLE rescind.key_mappings DROP COLUMN ts, DROP COLUMN uuid;
DROP INDEX rescind.applications_policy, rescind.applications_tenant, rescind.applications_name;
ALTER TABLE rescind.applications DROP COLUMN blocked, DROP COLUMN attributes, DROP COLUMN groups, DROP COLUMN token_type, DROP COLUMN policy, DROP COLUMN ts;
DROP TABLE rescind.apis;
DROP TABLE rescind.scopes;
DROP TABLE rescind.policies;
ALTER TABLE rescind.key_managers DROP COLUMN properties, DROP COLUMN token_type, DROP COLUMN claim_mappings, DROP COLUMN scopes_claim,
    DROP COLUMN consumer_key_claim, DROP COLUMN allow_typ, DROP COLUMN algorithms, DROP COLUMN jwks_uri, DROP COLUMN enabled,
    DROP COLUMN type, DROP COLUMN description, DROP COLUMN display_name, DROP COLUMN ts;
DELETE FROM rescind.tenant_heads h WHERE NOT EXISTS (SELECT FROM rescind.tenants t WHERE t.id = h.tenant_id);
ALTER TABLE rescind.tenant_heads ADD CONSTRAINT tenant_heads_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES rescind.tenants (id);
ALTER TABLE rescind.tenants ALTER COLUMN id DROP DEFAULT;
DROP SEQUENCE rescind.tenants_id;
ALTER TABLE rescind.tenants DROP COLUMN ts, DROP COLUMN display_name, DROP COLUMN uuid;
REVOKE ALL ON SEQUENCE rescind.key_managers_id_seq, rescind.applications_id_seq, rescind.key_mappings_id_seq FROM rescind_service;
