//! Lists in pages, as KuCoin cuts them: each list has its own parameter, usual size and limits.
//!
//! A page or size outside the documented limits is refused (assumed: no page says what KuCoin does with it).

use std::ops::RangeInclusive;

use serde_json::{Value, json};

use super::answers::{Outcome, Refusal};
use super::call::Call;
use super::orders::Product;

/// How a list is cut.
#[derive(Clone, Debug)]
pub(super) struct Paging {
    /// Name of the parameter that says which page, from 1.
    pub(super) number: &'static str,
    /// Sizes that a page may have.
    pub(super) sizes: RangeInclusive<usize>,
    /// Size when none is asked for; unset: number and size must be given.
    pub(super) usual: Option<usize>,
}

/// Stop orders and one-cancels-other orders of spot, and the old spot interface.
pub(super) const FIFTY: Paging = Paging {
    number: "currentPage",
    sizes: 10..=500,
    usual: Some(50),
};

/// Part of a list.
#[derive(Debug)]
pub(super) struct Page<'a> {
    /// Which one, from 1.
    pub(super) number: usize,
    /// At most so many items.
    pub(super) size: usize,
    /// Items in the list.
    pub(super) total: usize,
    /// Pages of it.
    pub(super) pages: usize,
    /// Those on this page.
    pub(super) items: &'a [Value],
}

impl Paging {
    /// Cuts the page that the call asks for out of the whole list.
    pub(super) fn cut<'a>(
        &self,
        call: &Call<'_>,
        product: Product,
        items: &'a [Value],
    ) -> Result<Page<'a>, Refusal> {
        let asked = |name: &str, usual: Option<usize>| match call.query(name) {
            None => usual,
            Some(value) => value.parse().ok(),
        };
        let first = self.usual.map(|_| 1);
        let number = asked(self.number, first)
            .filter(|number| *number > 0)
            .ok_or_else(|| product.bad_parameter(self.number))?;
        let size = asked("pageSize", self.usual)
            .filter(|size| self.sizes.contains(size))
            .ok_or_else(|| product.bad_parameter("pageSize"))?;
        Ok(Page {
            number,
            size,
            total: items.len(),
            pages: items.len().div_ceil(size),
            items: items.chunks(size).nth(number - 1).unwrap_or_default(),
        })
    }

    /// The same as Classic answers have it.
    pub(super) fn answer(&self, call: &Call<'_>, product: Product, items: &[Value]) -> Outcome {
        let page = self.cut(call, product, items)?;
        Ok(json!({
            "currentPage": page.number, "pageSize": page.size, "totalNum": page.total, "totalPage": page.pages,
            "items": page.items,
        }))
    }
}
