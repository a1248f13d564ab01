//! Paging of lists: each list of KuCoin has its own parameter name, default size and limits.
//!
//! A page number or size outside the documented limits is refused (assumed: KuCoin does not document it).

use std::ops::RangeInclusive;

use serde_json::{Value, json};

use super::answers::{Outcome, Refusal};
use super::call::Call;
use super::orders::Product;

/// How a list is paged.
#[derive(Clone, Debug)]
pub(super) struct Paging {
    /// Name of the parameter with the page number, which starts at 1.
    pub(super) number: &'static str,
    /// Allowed page sizes.
    pub(super) sizes: RangeInclusive<usize>,
    /// Default page size; unset: page number and size are required.
    pub(super) default_size: Option<usize>,
}

/// Paging of spot stop orders and OCO orders, and of the old spot API.
pub(super) const FIFTY: Paging = Paging {
    number: "currentPage",
    sizes: 10..=500,
    default_size: Some(50),
};

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page<'a> {
    /// Page number, from 1.
    pub(super) number: usize,
    /// Page size.
    pub(super) size: usize,
    /// Items in the list.
    pub(super) total: usize,
    /// Pages of the list.
    pub(super) pages: usize,
    /// The items of this page.
    pub(super) items: &'a [Value],
}

impl Paging {
    /// The page of the list that the call requests.
    pub(super) fn cut<'a>(
        &self,
        call: &Call<'_>,
        product: Product,
        items: &'a [Value],
    ) -> Result<Page<'a>, Refusal> {
        let requested = |name: &str, default: Option<usize>| match call.query(name) {
            None => default,
            Some(value) => value.parse().ok(),
        };
        let first = self.default_size.map(|_| 1);
        let number = requested(self.number, first)
            .filter(|number| *number > 0)
            .ok_or_else(|| product.bad_parameter(self.number))?;
        let size = requested("pageSize", self.default_size)
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

    /// The page in the format of Classic answers.
    pub(super) fn answer(&self, call: &Call<'_>, product: Product, items: &[Value]) -> Outcome {
        let page = self.cut(call, product, items)?;
        Ok(json!({
            "currentPage": page.number, "pageSize": page.size, "totalNum": page.total, "totalPage": page.pages,
            "items": page.items,
        }))
    }
}
