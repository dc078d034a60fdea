// Runs openid-client and jose against a running rescind-dev, whose dev.json is the argument:
// discovery, token, verification, introspection, revocation, and a client with a key.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import * as jose from 'jose'
import * as oidc from 'openid-client'

const dev = JSON.parse(await readFile(process.argv[2], 'utf8'))
const step = (what) => console.log(`ok - ${what}`)

// rescind-dev speaks plain HTTP on loopback, which libraries must be told to accept.
const insecure = { execute: [oidc.allowInsecureRequests] }

async function discover(algorithm, id, authentication) {
  return oidc.discovery(new URL(dev.base_url), id, undefined, authentication, { ...insecure, algorithm })
}

const basic = await discover('oidc', dev.client_id, oidc.ClientSecretBasic(dev.client_secret))
step('discovery of openid-configuration')
const post = await discover('oauth2', dev.client_id, oidc.ClientSecretPost(dev.client_secret))
step('discovery of oauth-authorization-server')

// verify does as a resource server does that has never seen the issuer before.
async function verify(config, token) {
  const server = config.serverMetadata()
  const keys = jose.createRemoteJWKSet(new URL(server.jwks_uri))
  const { payload, protectedHeader } = await jose.jwtVerify(token, keys, { issuer: server.issuer, typ: 'at+jwt' })
  assert.ok(protectedHeader.kid)
  return payload
}

async function lifeOf(what, config, id) {
  const { access_token: token, token_type: type, expires_in: expires } = await oidc.clientCredentialsGrant(config, { scope: 'read' })
  assert.equal(type, 'bearer') // which the library puts in lower case
  assert.ok(expires > 0)
  const claims = await verify(config, token)
  assert.equal(claims.client_id, id)
  assert.equal(claims.scope, 'read')
  const before = await oidc.tokenIntrospection(config, token)
  assert.equal(before.active, true)
  assert.equal(before.jti, claims.jti)
  await oidc.tokenRevocation(config, token)
  assert.deepEqual(await oidc.tokenIntrospection(config, token), { active: false })
  await oidc.tokenRevocation(config, token) // again
  step(`${what}: token, verification, introspection, revocation, introspection`)
}

await lifeOf('client_secret_basic', basic, dev.client_id)
await lifeOf('client_secret_post', post, dev.client_id)

await assert.rejects(oidc.clientCredentialsGrant(basic, { scope: 'nobody-has-this' }), (err) => err.error === 'invalid_scope')
const wrong = await discover('oauth2', dev.client_id, oidc.ClientSecretBasic('wrong'))
await assert.rejects(oidc.clientCredentialsGrant(wrong), (err) => err.cause?.some?.((c) => c.scheme === 'basic') ?? err.status === 401)
step('refusals are understood')

// A client whose only credential is a key pair that was made here.
async function manage(method, path, body) {
  const response = await fetch(dev.base_url + path, {
    method,
    headers: {
      authorization: 'Basic ' + Buffer.from(`${dev.admin_user}:${dev.admin_password}`).toString('base64'),
      'content-type': 'application/json',
    },
    body: JSON.stringify(body),
  })
  const text = await response.text()
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${text}`)
  return JSON.parse(text)
}

for (const alg of ['ES256', 'PS256', 'EdDSA']) {
  const { publicKey, privateKey } = await jose.generateKeyPair(alg, { extractable: true })
  const application = await manage('POST', '/v1/applications', { name: `interop ${crypto.randomUUID()}`, owner: 'admin' })
  const key = await manage('POST', `/v1/applications/${application.uuid}/keys`, {
    auth_method: 'private_key_jwt',
    jwks: { keys: [{ ...(await jose.exportJWK(publicKey)), kid: 'k1', alg }] },
    scopes: ['read'],
  })
  const config = await discover('oauth2', key.consumer_key, oidc.PrivateKeyJwt({ key: privateKey, kid: 'k1' }))
  await lifeOf(`private_key_jwt with ${alg}`, config, key.consumer_key)
}
