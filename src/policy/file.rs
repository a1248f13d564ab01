//! Parses the rules file into a [`Policy`], or returns every problem in it.

use std::sync::Arc;
use std::time::Duration;

use super::{Account, BotSettings, GrantOptions, MaxStale, Policy, Purpose, Rule, serves};
use crate::base::ids::{AccountId, BotId};
use crate::base::toml_file::{Problem, Problems, Section};
use crate::kucoin::catalog::Found;
use crate::kucoin::request::{self, RequestLimits};
use crate::kucoin::{Catalog, Endpoint, Method, Partner, Risk, Scope};

impl Policy {
    /// Reads the text of a rules file.
    ///
    /// # Errors
    /// Every problem of the file, each with its key.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let problems = Problems::default();
        let mut policy = Self::default();
        if let Some(mut rules) = Section::parse(text, "rules", &problems) {
            for (name, section) in rules.named_sections("account") {
                policy.add_account(&name, section);
            }
            for section in rules.numbered_sections("grant") {
                policy.add_grant(section);
            }
            for (name, section) in rules.named_sections("bot") {
                policy.add_bot(&name, section);
            }
        }
        problems.into_result().map(|()| policy)
    }

    fn add_account(&mut self, name: &str, mut section: Section) {
        let site = section.optional("site").unwrap_or_default();
        let vip = section.number("vip", 0, 0..=12);
        let parent_uid = section.optional::<String>("parent_uid");
        if parent_uid.as_ref().is_some_and(|uid| !is_uid(uid)) {
            section.problem(
                "parent_uid",
                "expected the UID of a KuCoin account, such as \"123456789\"",
            );
        }
        let purpose = section.optional("purpose").unwrap_or_default();
        let allow_money_out = section.optional("allow_money_out").unwrap_or_default();
        // While Vault is unreachable, a key that was revoked only in Vault stays in use for this long.
        let risk_increasing = section.number("max_stale_s", 15 * 60, 60..=24 * 3600);
        let cancels_and_reads = section.number("max_stale_cancel_s", 24 * 3600, 60..=7 * 24 * 3600);
        if cancels_and_reads < risk_increasing {
            section.problem(
                "max_stale_cancel_s",
                format_args!("is {cancels_and_reads}, less than max_stale_s = {risk_increasing}; set it to at least {risk_increasing}"),
            );
        }
        let mut keys = section.section("key");
        let mut partners = section.section("partner");
        let mut account = Account {
            id: match name.parse() {
                Ok(id) => id,
                Err(error) => return section.problem("", error),
            },
            site,
            vip: u8::try_from(vip).unwrap_or_default(),
            parent_uid,
            purpose,
            allow_money_out,
            keys: [].into(),
            partners: [].into(),
            max_stale: MaxStale {
                risk_increasing: Duration::from_secs(risk_increasing),
                cancels_and_reads: Duration::from_secs(cancels_and_reads),
            },
        };
        for scope in Scope::ALL {
            if let Some(key) = keys.optional(scope.as_str()) {
                if !site.serves(scope) {
                    keys.problem(
                        scope.as_str(),
                        format_args!("site {site} does not serve this scope; remove this entry"),
                    );
                }
                account.keys.insert(scope, key);
            }
            if partners.has(scope.as_str()) {
                let mut partner = partners.section(scope.as_str());
                let id = partner.required::<String>("id", "\"your-partner-id\"");
                let broker_name = partner.optional::<String>("broker_name");
                for (key, value) in [("id", &id), ("broker_name", &broker_name)] {
                    let fits = |text: &String| {
                        !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
                    };
                    if value.as_ref().is_some_and(|value| !fits(value)) {
                        partner.problem(
                            key,
                            "expected printable ASCII without spaces, because it is sent in a header",
                        );
                    }
                }
                if let Some(id) = id {
                    account.partners.insert(scope, Partner { id, broker_name });
                }
            }
        }
        let line = section.line("").unwrap_or_default();
        self.account_lines.insert(account.id.clone(), line);
        self.accounts.insert(account.id.clone(), Arc::new(account));
    }

    /// Reads the settings of a bot that grants name.
    fn add_bot(&mut self, name: &str, mut section: Section) {
        let weight = section.number("weight", 1, 1..=1000);
        let mut limit = |key: &'static str, most| {
            let is_set = section.has(key);
            let limit = section.number(key, 1, 1..=most);
            is_set.then_some(limit)
        };
        let requests_per_s = limit("requests_per_s", 10_000);
        let calls_in_flight = limit("calls_in_flight", 100_000);
        let bot = match name.parse::<BotId>() {
            Ok(bot) => bot,
            Err(error) => return section.problem("", error),
        };
        if !self.bots.contains_key(&bot) {
            let fix = format_args!("no grant names bot {bot}; correct the name, or remove it");
            return section.problem("", fix);
        }
        let settings = BotSettings {
            weight: u32::try_from(weight).unwrap_or(1),
            requests_per_s: requests_per_s.and_then(|limit| limit.try_into().ok()),
            calls_in_flight: calls_in_flight.and_then(|limit| limit.try_into().ok()),
        };
        self.settings.insert(bot, settings);
    }

    fn add_grant(&mut self, mut section: Section) {
        let bot = section.required::<BotId>("bot", "\"spiffe://example.org/bot/maker\"");
        let account = section.required::<AccountId>("account", "\"main\"");
        let scope = section.required::<Scope>("scope", "\"spot-margin\"");
        let entry = account.as_ref().and_then(|id| self.accounts.get(id));
        if let (Some(account), None) = (&account, entry) {
            let fix = format_args!(
                "account {account} is not in this file; add [account.{account}] or correct the name"
            );
            section.problem("account", fix);
        }
        let entry = entry.cloned();
        let target = GrantTarget {
            account: entry.as_deref(),
            scope,
        };
        // Read even if the bot, account or scope is wrong, so that all problems are reported together.
        let (entries, idle) = if section.optional("unlisted") == Some(true) {
            (target.read_unlisted(&mut section), None)
        } else {
            target.read_allow(&mut section)
        };
        let (Some(bot), Some(account), Some(scope), Some(_)) = (bot, account, scope, &entry) else {
            return;
        };
        let scopes = self.bots.entry(bot).or_default().entry(account);
        let grants = scopes.or_default().entry(scope).or_default();
        grants.idle.extend(idle);
        for (granted, rule) in entries {
            let rules = match granted {
                Granted::Class(class) => grants.classes.entry(class).or_default(),
                Granted::Endpoint(endpoint) => grants.endpoints.entry(&endpoint.id).or_default(),
                Granted::Unlisted(method, path) => {
                    grants.unlisted.entry((method, path)).or_default()
                }
            };
            rules.push(rule);
        }
    }
}

/// What one entry of a grant allows.
pub(super) enum Granted {
    Class(Risk),
    Endpoint(&'static Endpoint),
    Unlisted(Method, String),
}

/// The account and scope of a grant. Checks that need one that is `None` (missing or wrong in the file) are skipped.
#[derive(Clone, Copy)]
pub(super) struct GrantTarget<'a> {
    pub(super) account: Option<&'a Account>,
    pub(super) scope: Option<Scope>,
}

impl GrantTarget<'_> {
    /// The entries of `allow`; a list that is empty becomes a rule that grants nothing, for the warning about it.
    fn read_allow(self, section: &mut Section) -> (Vec<(Granted, Rule)>, Option<Rule>) {
        let options = grant_options(section);
        let words = section.required::<Vec<String>>("allow", "[\"read\", \"trade\"]");
        let Some(words) = words else {
            return (Vec::new(), None);
        };
        let mut entries = Vec::new();
        let idle = words.is_empty();
        let idle = idle.then(|| rule(section, "allow", "", options));
        for (index, word) in words.iter().enumerate() {
            let key = format!("allow[{index}]");
            match self.judge(word) {
                Ok(granted) => entries.push((granted, rule(section, &key, word, options))),
                Err(problem) => section.problem(&key, format_args!("{word:?} {problem}")),
            }
        }
        (entries, idle)
    }

    fn read_unlisted(self, section: &mut Section) -> Vec<(Granted, Rule)> {
        let method = section.required::<Method>("method", "\"GET\"");
        let path = section.required::<String>("path", "\"/api/v1/new-endpoint\"");
        let Some(path) = path else {
            return Vec::new();
        };
        if let Err(problem) = self.judge_unlisted(method, &path) {
            section.problem("path", problem);
            return Vec::new();
        }
        let options = GrantOptions {
            max_wait: max_wait(section),
            ..GrantOptions::default()
        };
        let rule = rule(section, "path", &path, options);
        let granted = method.map(|method| Granted::Unlisted(method, path));
        let entry = granted.map(|granted| (granted, rule));
        entry.into_iter().collect()
    }

    /// What an entry of `allow` grants here, or why it cannot be granted.
    pub(super) fn judge(self, word: &str) -> Result<Granted, String> {
        if let Some(class) = Risk::ALL.into_iter().find(|risk| risk.as_str() == word) {
            if !class.grantable_as_class() {
                return Err("cannot be granted as a class; list each endpoint by its id".to_owned());
            }
            self.fits(class)?;
            return Ok(Granted::Class(class));
        }
        let endpoint = Catalog::get().by_id(word).ok_or_else(|| {
            let classes = Risk::ALL
                .into_iter()
                .filter(|r| r.grantable_as_class())
                .map(Risk::as_str);
            let classes = classes.collect::<Vec<_>>().join(", ");
            format!("is neither a class ({classes}) nor the id of an endpoint in the catalogue")
        })?;
        let Some(belongs) = endpoint.scope else {
            return Err(
                "is on KuCoin's host for exchange brokers, which credbroker does not support"
                    .to_owned(),
            );
        };
        if let Some(scope) = self.scope
            && belongs != scope
        {
            return Err(format!("belongs to scope {belongs}, not to {scope}"));
        }
        if !endpoint.grantable {
            return Err(
                "creates, changes, returns or deletes API keys and can never be granted".to_owned(),
            );
        }
        if let Some(account) = self.account {
            if endpoint.risk.moves_money() && !account.allow_money_out {
                return Err(money_out(account, endpoint.risk.as_str()));
            }
            if !serves(account.site, endpoint) {
                return Err(format!("is not served by site {}", account.site));
            }
        }
        self.fits(endpoint.risk)?;
        Ok(Granted::Endpoint(endpoint))
    }

    /// Checks that an endpoint that is not in the catalogue can be granted here.
    pub(super) fn judge_unlisted(self, method: Option<Method>, path: &str) -> Result<(), String> {
        let mut problems = Vec::new();
        let limits = RequestLimits::default();
        let Some(target) = request::target(path, Vec::new(), &limits, &mut problems) else {
            return Err(problems
                .into_iter()
                .map(|problem| problem.problem)
                .collect::<Vec<_>>()
                .join("; "));
        };
        if let Some((scope, method)) = self.scope.zip(method) {
            match Catalog::get().find(scope, method, target.path()) {
                Found::Endpoint(endpoint) => {
                    return Err(format!(
                        "is the path of {} in the catalogue; grant that id in `allow`",
                        endpoint.id
                    ));
                }
                Found::Lookalike(endpoint) => {
                    return Err(format!(
                        "resembles the path of {} in the catalogue; grant that id in `allow`, or correct the path",
                        endpoint.id
                    ));
                }
                Found::NotAnId(endpoint) => {
                    return Err(format!(
                        "is the fixed path of {} ({}), so its last segment is not read as an id; check path, method and scope",
                        endpoint.id, endpoint.method
                    ));
                }
                Found::OtherScope(endpoint) => {
                    return Err(format!(
                        "is the path of {}, which does not belong to scope {scope}",
                        endpoint.id
                    ));
                }
                Found::Unlisted => {}
            }
        }
        if names_api_keys(path) {
            return Err(
                "contains \"api-key\" or another spelling of it; endpoints that manage API keys can never be granted"
                    .to_owned(),
            );
        }
        if let Some(account) = self.account
            && !account.allow_money_out
        {
            return Err(money_out(account, "unlisted"));
        }
        // The effect of such an endpoint is unknown: require what class `trade` requires.
        self.fits(Risk::Trade)
    }

    /// Checks that the account's site, key and purpose allow a class.
    fn fits(self, risk: Risk) -> Result<(), String> {
        match (self.account, self.scope) {
            (Some(account), Some(scope)) => fits_account(account, scope, risk),
            _ => Ok(()),
        }
    }
}

fn grant_options(section: &mut Section) -> GrantOptions {
    GrantOptions {
        client_oid: section.optional("client_oid").unwrap_or_default(),
        max_wait: max_wait(section),
    }
}

fn max_wait(section: &mut Section) -> Duration {
    Duration::from_millis(section.number("max_wait_ms", 200, 0..=10_000))
}

/// KuCoin's ids of accounts are numbers.
fn is_uid(text: &str) -> bool {
    (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn rule(section: &Section, key: &str, word: &str, options: GrantOptions) -> Rule {
    Rule {
        // A grant is a table of an array, which always has a line.
        line: section.line(key).unwrap_or_default(),
        key: section.key(key),
        word: word.to_owned(),
        options,
    }
}

fn fits_account(account: &Account, scope: Scope, risk: Risk) -> Result<(), String> {
    if !account.site.serves(scope) {
        return Err(format!(
            "cannot be granted: site {} does not serve scope {scope}",
            account.site
        ));
    }
    if risk != Risk::Public && !account.keys.contains_key(&scope) {
        return Err(format!(
            "needs a key, but the account has none in this scope; add {scope} = \"<key name>\" to [account.{}.key]",
            account.id
        ));
    }
    if account.purpose == Purpose::ReadOnly && !matches!(risk, Risk::Public | Risk::Read) {
        return Err(format!(
            "allows more than reads, but account {} has purpose = \"read-only\"",
            account.id
        ));
    }
    Ok(())
}

/// KuCoin writes `api-key` and, for exchange brokers, `apikey`; a lax router may accept other spellings.
fn names_api_keys(path: &str) -> bool {
    let letters = path.chars().filter(|c| !matches!(c, '-' | '.' | '_' | '~'));
    let letters: String = letters.collect();
    letters.to_ascii_lowercase().contains("apikey")
}

fn money_out(account: &Account, kind: &str) -> String {
    format!(
        "({kind}) can move money and needs allow_money_out = true in [account.{}]",
        account.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(rules: &str) -> Vec<String> {
        let problems = Policy::parse(rules).expect_err("these rules have problems");
        problems.iter().map(ToString::to_string).collect()
    }

    const ACCOUNT: &str = "[account.main]\nkey = { spot-margin = \"main\" }\n";

    fn grant(allow: &str) -> String {
        format!(
            "{ACCOUNT}[[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"spot-margin\"\nallow = [{allow}]\n"
        )
    }

    #[test]
    fn every_problem_is_reported_under_its_key() {
        let rules = r#"
            typo = 1
            [account.Main]
            [account.a]
            site = "mars"
            vip = 13
            allow_monye_out = true
            [account.e]
            site = "eu"
            key = { futures = "main" }
            [[grant]]
            bot = "spiffe://x/admin/y"
            account = "a"
            scope = "spot"
            [[grant]]
            bot = "b"
            account = "nobody"
            scope = "futures"
            allow = ["read"]
        "#;
        let problems = problems(rules);
        let keys: Vec<_> = problems
            .iter()
            .map(|p| p.split(": ").nth(1).unwrap())
            .collect();
        for key in [
            "typo",
            "account.Main",
            "account.a.site",
            "account.a.vip",
            "account.a.allow_monye_out",
            "account.e.key.futures",
            "grant[0].bot",
            "grant[0].scope",
            "grant[0].allow",
            "grant[1].account",
        ] {
            assert!(keys.contains(&key), "{key} is not among {keys:?}");
        }
    }

    #[test]
    fn entries_of_a_grant_are_checked_even_if_its_account_or_bot_is_wrong() {
        let rules = r#"
            [account.main]
            key = { spot-margin = "main" }
            [[grant]]
            bot = "b"
            account = "nobody"
            scope = "spot-margin"
            allow = ["withdraw", "read", "futures.get.v1-position"]
            [[grant]]
            account = "main"
            scope = "spot-margin"
            allow = ["spot.post.v3-withdrawals"]
            [[grant]]
            bot = "b"
            account = "nobody"
            scope = "spot-margin"
            unlisted = true
            method = "GET"
            path = "/api/v9/apikey"
        "#;
        let problems = problems(rules);
        let expected = [
            "line 6: grant[0].account: account nobody is not in this file; add [account.nobody] or correct the name",
            "line 8: grant[0].allow[0]: \"withdraw\" cannot be granted as a class; list each endpoint by its id",
            "line 8: grant[0].allow[2]: \"futures.get.v1-position\" belongs to scope futures, not to spot-margin",
            "line 9: grant[1].bot: is missing; add it, for example: bot = \"spiffe://example.org/bot/maker\"",
            "line 12: grant[1].allow[0]: \"spot.post.v3-withdrawals\" (withdraw) can move money and needs \
             allow_money_out = true in [account.main]",
            "line 15: grant[2].account: account nobody is not in this file; add [account.nobody] or correct the name",
            "line 19: grant[2].path: contains \"api-key\" or another spelling of it; endpoints that manage API keys can never be granted",
        ];
        assert_eq!(problems, expected);
    }

    #[test]
    fn every_problem_of_a_truncated_file_has_a_line_in_it() {
        let text = include_str!("../../deploy/rules.toml");
        let mut problems = 0;
        for end in (0..text.len()).step_by(3) {
            let truncated = text.get(..end).unwrap();
            for problem in Policy::parse(truncated).err().into_iter().flatten() {
                let line = problem.line.unwrap();
                assert!(
                    (1..=truncated.split('\n').count()).contains(&line),
                    "{problem}"
                );
                problems += 1;
            }
        }
        assert!(problems > 100, "{problems}");
    }

    #[test]
    fn classes_that_move_money_are_never_granted() {
        for risk in Risk::ALL
            .into_iter()
            .filter(|risk| !risk.grantable_as_class())
        {
            let rules = grant(&format!("\"{}\"", risk.as_str()))
                .replace("[account.main]", "[account.main]\nallow_money_out = true");
            assert!(
                problems(&rules)[0].contains("cannot be granted as a class"),
                "{}",
                risk.as_str()
            );
        }
    }

    #[test]
    fn endpoint_that_moves_money_needs_allow_money_out() {
        let rules = grant("\"spot.post.v3-withdrawals\"");
        assert!(problems(&rules)[0].contains("needs allow_money_out = true in [account.main]"));
        assert!(
            Policy::parse(
                &rules.replace("[account.main]", "[account.main]\nallow_money_out = true")
            )
            .is_ok()
        );
    }

    #[test]
    fn no_endpoint_of_api_keys_can_be_granted() {
        for endpoint in Catalog::get()
            .endpoints()
            .iter()
            .filter(|endpoint| !endpoint.grantable)
        {
            let Some(scope) = endpoint.scope else {
                continue;
            };
            let rules = format!(
                "[account.main]\nallow_money_out = true\nkey = {{ {scope} = \"main\" }}\n\
                 [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = [\"{}\"]\n",
                endpoint.id
            );
            assert!(
                problems(&rules)[0].contains("can never be granted"),
                "{}",
                endpoint.id
            );
        }
    }

    #[test]
    fn unlisted_endpoint_needs_money_out_and_no_api_key_path() {
        let rules = |path: &str, money_out: bool| {
            format!(
                "[account.main]\nallow_money_out = {money_out}\nkey = {{ spot-margin = \"main\" }}\n\
                 [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"spot-margin\"\n\
                 unlisted = true\nmethod = \"GET\"\npath = \"{path}\"\n"
            )
        };
        assert!(Policy::parse(&rules("/api/v9/new", true)).is_ok());
        assert!(problems(&rules("/api/v9/new", false))[0].contains("allow_money_out"));
        for path in [
            "/api/v9/sub/API-Key/list",
            "/api/v9/apikey",
            "/api/v1/broker/nd/account/ApiKey",
            "/api/v9/sub/api_key.json",
            "/api/v9/a.pi-k~ey",
        ] {
            assert!(
                problems(&rules(path, true))[0].contains("api-key"),
                "{path}"
            );
        }
        let other_scope = problems(&rules("/api/v1/account-overview", true));
        assert!(
            other_scope[0].contains("does not belong to scope spot-margin"),
            "{other_scope:?}"
        );
        let other_host = problems(&rules("/api/v1/broker/nd/info", true));
        assert!(
            other_host[0].contains("does not belong to scope spot-margin"),
            "{other_host:?}"
        );
        assert!(problems(&rules("/api/v1/accounts", true))[0].contains("in the catalogue"));
        assert!(problems(&rules("/api/v9/../new", true))[0].contains("expected segments"));
        assert!(problems(&rules("/api/v9/new", true).replace("unlisted = true\n", "")).len() >= 2);
    }

    #[test]
    fn undocumented_endpoint_is_granted_only_by_its_id() {
        let allowed = |allow: &str, method, path: &str| {
            let rules = grant(allow)
                .replace("spot-margin = \"main\"", "unified = \"main\"")
                .replace("scope = \"spot-margin\"", "scope = \"unified\"");
            let policy = Policy::parse(&rules).unwrap();
            let (bot, account) = ("b".parse().unwrap(), "main".parse().unwrap());
            policy
                .explain(&bot, &account, Scope::Unified, method, path)
                .verdict
                .is_ok()
        };
        let classes = "\"public\", \"read\", \"trade\", \"trade-config\"";
        for (id, method, path) in [
            (
                "spot.get.ua-v1-classic-account-balance",
                Method::Get,
                "/api/ua/v1/classic/account/balance",
            ),
            (
                "spot.post.ua-v1-classic-account-modify-leverage",
                Method::Post,
                "/api/ua/v1/classic/account/modify-leverage",
            ),
            (
                "spot.post.ua-v1-classic-order-cancel-all",
                Method::Post,
                "/api/ua/v1/classic/order/cancel-all",
            ),
        ] {
            assert!(!allowed(classes, method, path), "{path} by class");
            assert!(allowed(&format!("{id:?}"), method, path), "{path} by id");
            assert!(
                allowed(&format!("{classes}, {id:?}"), method, path),
                "{path} by both"
            );
        }
    }

    #[test]
    fn client_oid_of_a_grant_is_required_or_optional() {
        let rules = |value: &str| grant("\"trade\"") + &format!("client_oid = {value}\n");
        for value in ["\"optional\"", "\"required\""] {
            assert!(Policy::parse(&rules(value)).is_ok(), "{value}");
        }
        let unknown = problems(&rules("\"none\""));
        assert!(
            unknown[0].starts_with("line 8: grant[0].client_oid: "),
            "{unknown:?}"
        );
        // It has no effect on an endpoint whose requests are unknown.
        let unlisted = rules("\"optional\"")
            .replace(
                "allow = [\"trade\"]",
                "unlisted = true\nmethod = \"GET\"\npath = \"/api/v9/new\"",
            )
            .replace("[account.main]", "[account.main]\nallow_money_out = true");
        assert!(problems(&unlisted)[0].contains("client_oid"));
    }

    #[test]
    fn read_only_account_cannot_be_granted_trading() {
        let rules =
            grant("\"trade\"").replace("[account.main]", "[account.main]\npurpose = \"read-only\"");
        assert!(problems(&rules)[0].contains("read-only"));
    }
}
