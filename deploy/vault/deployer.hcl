# For deployers, who start brokers: may create secret_ids of one role, but only wrapped. The host that unwraps one can be sure
# that nobody has read it before.
#
# `approle` and `credbroker` are the mount and the name of the broker's role. The role limits what a secret_id may do.

path "auth/approle/role/credbroker/secret-id" {
  capabilities     = ["update"]
  min_wrapping_ttl = "30s"
  max_wrapping_ttl = "5m"
}
