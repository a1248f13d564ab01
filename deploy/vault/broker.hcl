# For the broker: may read the keys of all accounts of one environment, and renew and revoke its own token.
#
# `kv` and `kucoin/prod` are `vault.mount` and `vault.prefix` of the broker's configuration; change them in both places.
# To limit a broker to some accounts, replace the first two lines with two lines per account, for example:
#   path "kv/data/kucoin/prod/main/*"     { capabilities = ["read"] }
#   path "kv/metadata/kucoin/prod/main/*" { capabilities = ["read"] }

path "kv/data/kucoin/prod/*"     { capabilities = ["read"] }
path "kv/metadata/kucoin/prod/*" { capabilities = ["read"] }   # polled; metadata holds no secret

# The policy `default` has these three too, but also more than the broker needs: create its roles without the default policy.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self"  { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
