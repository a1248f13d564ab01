//! Compares, for one order, the exchange's order book, the audit log, and what its bot was told. Pure.

use std::fmt;

/// What a bot was told about an order by one of its calls.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Told {
    /// No answer, or an error that is not the broker's.
    NoAnswer,
    /// `not_sent`.
    NotSent,
    /// The exchange rejected it.
    Rejected,
    /// Lookups have shown that it was not placed.
    Absent,
    /// `maybe_sent`.
    Maybe,
    /// Lookups have not shown whether it was placed.
    Unknown,
    /// Accepted, or found by a lookup; with the order id if the bot got one.
    Placed(Option<String>),
    /// An earlier call had its clientOid: `order_outcome` and `order_id`.
    Repeated(String, Option<String>),
}

impl Told {
    fn is_not_placed(&self) -> bool {
        matches!(self, Self::NotSent | Self::Rejected | Self::Absent)
    }

    /// Whether the bot does not know more than before.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            Self::NoAnswer | Self::Maybe | Self::Unknown => true,
            Self::Repeated(state, _) => state != "accepted",
            _ => false,
        }
    }
}

/// A call of a bot that places the order.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    /// Exchange time.
    pub(crate) not_after_ms: i64,
    pub(crate) told: Told,
}

/// What the audit log says at last about a call that places the order and has an `intent` line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Recorded {
    NotPlaced,
    Open,
    Placed(Option<String>),
}

/// What `GetOutcome` says about the order after all is calm.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Later {
    NotPlaced,
    Open,
    /// Empty id: not known.
    Placed(String),
}

/// Everything that is known about an order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The row of the last call.
    pub(crate) row: String,
    /// The calls, oldest first.
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) recorded: Vec<Recorded>,
    pub(crate) later: Option<Later>,
    /// When the exchange received a request of the broker with it and a right signature, in exchange time; oldest first.
    pub(crate) received_ms: Vec<i64>,
    /// Ids of the orders with its clientOid that the exchange has from the broker.
    pub(crate) book: Vec<String>,
    /// The same, of orders that were placed without the broker.
    pub(crate) others: Vec<String>,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Wrong {
    /// It was reported as placed, and the exchange has no such order; or the exchange got it, and no audit line says so.
    Lost,
    /// The exchange has it twice, or got it twice although the first request could have placed it.
    Repeated,
    /// The exchange got it after its `not_after_ms`.
    Late,
    /// It was reported as not placed, and the exchange has it; or nothing says what became of it.
    Unexplained,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Repeated => "repeated",
            Self::Late => "late",
            Self::Unexplained => "unexplained",
        })
    }
}

/// The verdict about an order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) wrong: Vec<(Wrong, String)>,
    /// Neither the bot nor the audit log nor `GetOutcome` says whether it was placed.
    pub(crate) is_unknown: bool,
    /// By how much the exchange got it after its `not_after_ms`; negative if before.
    pub(crate) late_by_ms: Option<i64>,
}

/// Compares what is known about an order. `late_ms`: how late it may be.
pub(crate) fn judge(facts: &Facts, late_ms: i64) -> Verdict {
    let mut verdict = Verdict::default();
    let mut wrong = |what, why: String| verdict.wrong.push((what, why));
    let Facts {
        attempts,
        recorded,
        later,
        received_ms,
        book,
        others,
        row: _,
    } = facts;
    let is_in_book = |id: Option<&String>| match id {
        Some(id) => book.contains(id),
        None => !book.is_empty(),
    };
    let is_anywhere = |id: Option<&String>| {
        is_in_book(id) || {
            match id {
                Some(id) => others.contains(id),
                None => !others.is_empty(),
            }
        }
    };

    for Attempt { told, .. } in attempts {
        let is_true = match told {
            Told::Placed(id) => is_in_book(id.as_ref()),
            Told::Repeated(state, id) if state == "accepted" => is_anywhere(id.as_ref()),
            _ => true,
        };
        if !is_true {
            wrong(Wrong::Lost, format!("the bot was told {told:?}"));
        }
    }
    for record in recorded {
        if let Recorded::Placed(id) = record
            && !is_in_book(id.as_ref())
        {
            wrong(Wrong::Lost, format!("the audit log says {record:?}"));
        }
    }
    if let Some(Later::Placed(id)) = later
        && !is_anywhere(Some(id).filter(|id| !id.is_empty()))
    {
        wrong(Wrong::Lost, format!("GetOutcome says {later:?}"));
    }
    if received_ms.len() > recorded.len() {
        let (sent, lines) = (received_ms.len(), recorded.len());
        wrong(
            Wrong::Lost,
            format!("sent {sent} times, with {lines} intent lines"),
        );
    }

    // A call that repeats a known clientOid sends nothing; the first one can, if only the exchange knows it.
    let sends = |(at, attempt): &(usize, &Attempt)| match attempt.told {
        Told::NotSent => false,
        Told::Repeated(..) => *at == 0,
        _ => true,
    };
    let sent: Vec<_> = attempts.iter().enumerate().filter(sends).collect();
    if sent.is_empty() && !received_ms.is_empty() {
        wrong(
            Wrong::Unexplained,
            "not_sent, but the exchange got it".to_owned(),
        );
    } else if received_ms.len() > sent.len() {
        let (got, calls) = (received_ms.len(), sent.len());
        wrong(
            Wrong::Repeated,
            format!("the exchange got it {got} times, from {calls} calls"),
        );
    }
    if book.len() > 1 {
        wrong(Wrong::Repeated, format!("the exchange has {book:?}"));
    }

    let limits = sent.iter().map(|(_, attempt)| attempt.not_after_ms);
    let late = received_ms.iter().zip(limits).map(|(at, limit)| at - limit);
    let late_by_ms = late.max();
    if let Some(by_ms) = late_by_ms.filter(|by_ms| *by_ms > late_ms) {
        wrong(Wrong::Late, format!("by {by_ms} ms"));
    }

    let is_placed = !book.is_empty();
    let not_placed = |attempt: &Attempt| attempt.told.is_not_placed();
    let is_all_not_placed = !attempts.is_empty() && attempts.iter().all(not_placed);
    let was_placed_before = |at: usize| !attempts[..at].iter().all(not_placed);
    let is_denied_later = attempts
        .iter()
        .enumerate()
        .any(|(at, attempt)| not_placed(attempt) && was_placed_before(at));
    if is_placed && (is_all_not_placed || is_denied_later) {
        wrong(
            Wrong::Unexplained,
            "the bot was told that it was not placed".to_owned(),
        );
    }
    let is_recorded_as_not_placed = recorded.iter().all(|record| *record == Recorded::NotPlaced);
    if is_placed && is_recorded_as_not_placed {
        wrong(
            Wrong::Unexplained,
            "the audit log says that it was not placed".to_owned(),
        );
    }
    if is_placed && *later == Some(Later::NotPlaced) {
        wrong(
            Wrong::Unexplained,
            "GetOutcome says that it was not placed".to_owned(),
        );
    }
    let is_recorded = is_recorded_as_not_placed
        || recorded
            .iter()
            .any(|record| matches!(record, Recorded::Placed(_)));
    let is_known_later = matches!(later, Some(Later::NotPlaced | Later::Placed(_)));
    verdict.is_unknown =
        !is_recorded && !is_known_later && attempts.iter().all(|attempt| attempt.told.is_open());
    verdict.late_by_ms = late_by_ms;
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE_MS: i64 = 50;

    fn attempt(told: Told) -> Attempt {
        Attempt {
            not_after_ms: 1000,
            told,
        }
    }

    fn known(id: &str) -> Recorded {
        Recorded::Placed(Some(id.to_owned()))
    }

    fn told_placed(id: &str) -> Told {
        Told::Placed(Some(id.to_owned()))
    }

    fn told_repeated(state: &str, id: Option<&str>) -> Told {
        Told::Repeated(state.to_owned(), id.map(str::to_owned))
    }

    /// An order that was placed once, and whose bot was told so.
    fn placed() -> Facts {
        Facts {
            attempts: vec![attempt(told_placed("7"))],
            recorded: vec![known("7")],
            later: Some(Later::Placed("7".to_owned())),
            received_ms: vec![900],
            book: vec!["7".to_owned()],
            ..Facts::default()
        }
    }

    /// An order that was not placed, and whose bot was told this.
    fn not_placed(told: Told) -> Facts {
        Facts {
            attempts: vec![attempt(told)],
            recorded: vec![Recorded::NotPlaced],
            later: Some(Later::NotPlaced),
            ..Facts::default()
        }
    }

    fn wrong(facts: &Facts) -> Vec<Wrong> {
        let verdict = judge(facts, LATE_MS);
        let mut wrong: Vec<_> = verdict.wrong.iter().map(|(what, _)| *what).collect();
        wrong.dedup();
        wrong
    }

    #[test]
    fn sources_that_agree_are_right() {
        assert_eq!(judge(&placed(), LATE_MS).late_by_ms, Some(-100));
        for facts in [
            placed(),
            not_placed(Told::NotSent),
            not_placed(Told::Rejected),
            not_placed(Told::Absent),
        ] {
            assert_eq!(wrong(&facts), []);
            assert!(!judge(&facts, LATE_MS).is_unknown);
        }
        // Placed by the second call, after the first one was not sent.
        let mut second = placed();
        second.attempts.insert(0, attempt(Told::NotSent));
        second.recorded.insert(0, Recorded::NotPlaced);
        assert_eq!(wrong(&second), []);
        // The answer was lost; the audit log or GetOutcome knows.
        let mut lost = placed();
        lost.attempts = vec![attempt(Told::NoAnswer)];
        for (recorded, later) in [
            (known("7"), None),
            (Recorded::Open, Some(Later::Placed(String::new()))),
        ] {
            (lost.recorded, lost.later) = (vec![recorded], later);
            assert_eq!(wrong(&lost), []);
            assert!(!judge(&lost, LATE_MS).is_unknown);
        }
        // An order of somebody else has the clientOid.
        let mut repeated = not_placed(told_repeated("accepted", Some("3")));
        (repeated.others, repeated.received_ms) = (vec!["3".to_owned()], vec![900]);
        assert_eq!(wrong(&repeated), []);
    }

    #[test]
    fn order_that_the_exchange_does_not_have_is_lost() {
        let told = Facts {
            book: Vec::new(),
            ..placed()
        };
        assert_eq!(wrong(&told), [Wrong::Lost]);
        let other_id = Facts {
            book: vec!["8".to_owned()],
            ..placed()
        };
        assert_eq!(wrong(&other_id), [Wrong::Lost]);
        // Found by its clientOid alone: it is somebody else's.
        let mut found = not_placed(Told::Maybe);
        (found.recorded, found.others) = (vec![known("3")], vec!["3".to_owned()]);
        assert_eq!(wrong(&found), [Wrong::Lost]);
        let no_line = Facts {
            recorded: Vec::new(),
            ..placed()
        };
        assert!(wrong(&no_line).contains(&Wrong::Lost));
        let mut later = not_placed(Told::NoAnswer);
        later.later = Some(Later::Placed(String::new()));
        assert_eq!(wrong(&later), [Wrong::Lost]);
    }

    #[test]
    fn order_that_the_exchange_got_twice_is_repeated() {
        let mut twice = placed();
        twice.received_ms.push(950);
        twice.recorded.push(Recorded::Open);
        assert_eq!(wrong(&twice), [Wrong::Repeated]);
        // The second call sent it again, although its answer says that it was sent before.
        twice
            .attempts
            .push(attempt(told_repeated("accepted", Some("7"))));
        assert_eq!(wrong(&twice), [Wrong::Repeated]);
        let mut two = placed();
        two.book.push("8".to_owned());
        assert_eq!(wrong(&two), [Wrong::Repeated]);
        // Sent again after the exchange rejected it.
        let mut rejected = placed();
        rejected.attempts.insert(0, attempt(Told::Rejected));
        rejected.recorded.insert(0, Recorded::NotPlaced);
        rejected.received_ms.insert(0, 800);
        assert_eq!(wrong(&rejected), []);
    }

    #[test]
    fn order_that_arrives_after_its_limit_is_late() {
        let mut late = placed();
        late.received_ms = vec![1000 + LATE_MS];
        assert_eq!(wrong(&late), []);
        late.received_ms = vec![1001 + LATE_MS];
        assert_eq!(wrong(&late), [Wrong::Late]);
        // The limit of the call that was sent counts.
        late.attempts.insert(
            0,
            Attempt {
                not_after_ms: 9000,
                told: Told::NotSent,
            },
        );
        late.recorded.insert(0, Recorded::NotPlaced);
        assert_eq!(wrong(&late), [Wrong::Late]);
    }

    #[test]
    fn order_that_nothing_explains_is_unexplained_or_unknown() {
        for told in [Told::NotSent, Told::Rejected, Told::Absent] {
            let mut hidden = placed();
            hidden.attempts = vec![attempt(told)];
            assert_eq!(wrong(&hidden), [Wrong::Unexplained]);
        }
        let mut got = not_placed(Told::NotSent);
        got.received_ms = vec![900];
        assert_eq!(wrong(&got), [Wrong::Unexplained]);
        // A known clientOid was answered with not_sent.
        let mut denied = placed();
        denied.attempts.push(attempt(Told::NotSent));
        assert_eq!(wrong(&denied), [Wrong::Unexplained]);
        let audit = Facts {
            recorded: vec![Recorded::NotPlaced],
            ..placed()
        };
        assert_eq!(wrong(&audit), [Wrong::Unexplained]);
        let later = Facts {
            later: Some(Later::NotPlaced),
            ..placed()
        };
        assert_eq!(wrong(&later), [Wrong::Unexplained]);
        for told in [
            Told::Maybe,
            Told::NoAnswer,
            Told::Unknown,
            told_repeated("in_flight", None),
        ] {
            let open = Facts {
                attempts: vec![attempt(told)],
                recorded: vec![Recorded::Open],
                later: Some(Later::Open),
                received_ms: vec![900],
                ..Facts::default()
            };
            let verdict = judge(&open, LATE_MS);
            assert!(
                verdict.is_unknown && verdict.wrong.is_empty(),
                "{verdict:?}"
            );
        }
    }
}
