# What the broker may do: read the keys of all accounts of one environment, and keep its own token alive.
#
# `kv` and `kucoin/prod` are `vault.mount` and `vault.prefix` of the broker's configuration; change them in both places.
# A broker for some accounts only gets two lines for each in place of the first two here, such as
#   path "kv/data/kucoin/prod/main/*"     { capabilities = ["read"] }
#   path "kv/metadata/kucoin/prod/main/*" { capabilities = ["read"] }

path "kv/data/kucoin/prod/*"     { capabilities = ["read"] }
path "kv/metadata/kucoin/prod/*" { capabilities = ["read"] }   # polled; it never holds the secret

# The policy `default` has these three as well, with more that the broker does not need: give its roles no default policy.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self"  { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
