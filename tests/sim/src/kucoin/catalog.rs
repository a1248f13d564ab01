//! Finds the endpoint of a host, method and path in the project's catalogue.

use std::collections::HashMap;
use std::io;

use serde::{Deserialize, Serialize};

/// The catalogue is data about KuCoin; it is the only thing that the simulator shares with the broker.
const CATALOGUE: &str = include_str!("../../../../src/kucoin/endpoints.json");

/// One of KuCoin's two main hosts.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// `api-futures.kucoin.com`.
    Futures,
    /// `api.kucoin.com`: spot, margin, account and unified account.
    Spot,
}

/// An endpoint of the catalogue, with the fields that a server needs.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Endpoint {
    /// Catalogue id.
    pub(super) id: String,
    /// HTTP method.
    pub(super) method: String,
    /// Path; `{name}` stands for a parameter.
    pub(super) path: String,
    host: String,
    risk: String,
    permission: Option<String>,
    rate_limit_pool: Option<String>,
    weight: Option<u64>,
    weight_assumed: Option<u64>,
}

impl Endpoint {
    /// Whether it needs a signature.
    pub(super) fn is_private(&self) -> bool {
        self.risk != "public"
    }

    /// The permission that a key needs; General, which every key has, if the catalogue names none.
    pub(super) fn permission(&self) -> &str {
        self.permission.as_deref().unwrap_or("General")
    }

    /// The rate limit pool; Public for public endpoints without one.
    pub(super) fn pool(&self) -> Option<&str> {
        let fallback = if self.is_private() {
            None
        } else {
            Some("Public")
        };
        self.rate_limit_pool.as_deref().or(fallback)
    }

    /// The weight of one call.
    pub(super) fn weight(&self) -> u64 {
        self.weight.or(self.weight_assumed).unwrap_or(1)
    }
}

/// An endpoint and the values of its path parameters, in order.
#[derive(Debug)]
pub(super) struct Route<'a> {
    /// The endpoint.
    pub(super) endpoint: &'a Endpoint,
    /// Name and value of each path parameter, as sent.
    pub(super) params: Vec<(String, String)>,
}

/// All endpoints of both hosts.
#[derive(Debug)]
pub(super) struct Catalog {
    literal: HashMap<(Host, String, String), Endpoint>,
    templates: Vec<(Host, Endpoint)>,
}

impl Catalog {
    /// Reads the built-in catalogue. Fails if it cannot be parsed.
    pub(super) fn load() -> io::Result<Self> {
        let endpoints: Vec<Endpoint> = serde_json::from_str(CATALOGUE)?;
        let mut catalog = Self {
            literal: HashMap::new(),
            templates: Vec::new(),
        };
        for endpoint in endpoints {
            let host = match endpoint.host.as_str() {
                "futures" => Host::Futures,
                "spot" => Host::Spot,
                // The host of exchange brokers is not simulated.
                _ => continue,
            };
            if endpoint.path.contains('{') {
                catalog.templates.push((host, endpoint));
            } else {
                let at = (host, endpoint.method.clone(), endpoint.path.clone());
                catalog.literal.insert(at, endpoint);
            }
        }
        Ok(catalog)
    }

    /// Finds the endpoint of a request; a literal path wins over a template.
    pub(super) fn find(&self, host: Host, method: &str, path: &str) -> Option<Route<'_>> {
        let at = (host, method.to_owned(), path.to_owned());
        if let Some(endpoint) = self.literal.get(&at) {
            return Some(Route {
                endpoint,
                params: Vec::new(),
            });
        }
        self.templates
            .iter()
            .filter(|(at, endpoint)| *at == host && endpoint.method == method)
            .find_map(|(_, endpoint)| {
                let params = matching(&endpoint.path, path)?;
                Some(Route { endpoint, params })
            })
    }
}

/// The parameters if `path` matches `template`. A parameter takes the rest of its segment and is never empty.
fn matching(template: &str, path: &str) -> Option<Vec<(String, String)>> {
    let mut params = Vec::new();
    let mut segments = path.split('/');
    for wanted in template.split('/') {
        let found = segments.next()?;
        match wanted.split_once('{') {
            None if wanted == found => {}
            None => return None,
            Some((before, name)) => {
                let value = found
                    .strip_prefix(before)
                    .filter(|value| !value.is_empty())?;
                params.push((name.trim_end_matches('}').to_owned(), value.to_owned()));
            }
        }
    }
    segments.next().is_none().then_some(params)
}

#[cfg(test)]
mod tests {
    use super::{Catalog, Host};

    fn found(host: Host, method: &str, path: &str) -> Option<String> {
        let catalog = Catalog::load().unwrap();
        catalog
            .find(host, method, path)
            .map(|route| route.endpoint.path.clone())
    }

    #[test]
    fn a_literal_path_wins_over_a_template() {
        for path in ["/api/v1/hf/orders/cancelAll", "/api/v1/stop-order/cancel"] {
            assert_eq!(found(Host::Spot, "DELETE", path).as_deref(), Some(path));
        }
        let by_id = found(Host::Spot, "DELETE", "/api/v1/hf/orders/abc");
        assert_eq!(by_id.as_deref(), Some("/api/v1/hf/orders/{orderId}"));
    }

    #[test]
    fn template_parameter_can_be_part_of_a_segment() {
        let path = "/api/v1/level2/depth20";
        let endpoint = found(Host::Futures, "GET", path);
        assert_eq!(endpoint.as_deref(), Some("/api/v1/level2/depth{size}"));
        assert_eq!(found(Host::Futures, "GET", "/api/v1/level2/depth"), None);
    }

    #[test]
    fn an_endpoint_of_the_other_host_is_unknown() {
        assert!(found(Host::Spot, "GET", "/api/v1/account-overview").is_none());
        assert!(found(Host::Futures, "GET", "/api/v1/account-overview").is_some());
        assert!(found(Host::Futures, "POST", "/api/v1/hf/orders").is_none());
    }
}
