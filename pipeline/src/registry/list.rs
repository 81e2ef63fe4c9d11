//! Names that a registry lists: its repositories, and the tags of one of them (distribution-spec, "Listing Tags"), page by page.
//!
//! A registry says with `Link` where the next page is. Only its path and query count: behind a proxy that ends TLS, registries name
//! themselves wrongly, and no list is anybody else's to continue.

use std::collections::HashSet;
use std::sync::Arc;

use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, StatusCode};
use url::Url;

use super::auth::Scope;
use super::error::{Operation, RegistryError, Request};
use super::host::RegistryHost;
use super::manifest::MANIFEST_CAP;
use super::transport::{Call, protocol};
use super::{Repository, http};

/// Names that are asked for at once. Registries may give fewer.
const PAGE: usize = 1000;
/// Pages of one list, so that no registry can go on for ever.
const PAGES_MAX: usize = 100_000;
/// Names of one list that are held at once.
const NAMES_MAX: usize = 1_000_000;

/// A list of names that is read page by page.
#[derive(Debug)]
pub struct Names {
    host: Arc<RegistryHost>,
    scope: Scope,
    request: Request,
    /// Where the list is, below the registry's base.
    path: String,
    /// The member of the answer that holds the names.
    field: &'static str,
    next: Next,
    asked: HashSet<String>,
}

#[derive(Debug)]
enum Next {
    First,
    Page(Url),
    None,
}

impl Repository {
    /// The repository's tags.
    pub fn tags(&self) -> Names {
        let (scope, request) = (self.scope(), self.request(Operation::ListTags));
        Names::new(Arc::clone(&self.host), scope, request, format!("{}/tags/list", self.name), "tags")
    }
}

impl Names {
    pub(super) fn of_repositories(host: Arc<RegistryHost>) -> Self {
        let request = host.request(None, Operation::ListRepositories);
        Self::new(host, Scope::Catalog, request, "_catalog".to_owned(), "repositories")
    }

    fn new(
        host: Arc<RegistryHost>,
        scope: Scope,
        request: Request,
        path: String,
        field: &'static str,
    ) -> Self {
        Self { host, scope, request, path, field, next: Next::First, asked: HashSet::new() }
    }

    /// The names of the next page, in the registry's order. None behind the last one.
    pub async fn page(&mut self) -> Result<Option<Vec<String>>, RegistryError> {
        let url = match std::mem::replace(&mut self.next, Next::None) {
            Next::None => return Ok(None),
            Next::Page(url) => url,
            Next::First => {
                let base = self.host.base().await?;
                let mut url = base.clone();
                url.set_path(&format!("{}{}", base.path(), self.path));
                url.set_query(Some(&format!("n={PAGE}")));
                url
            }
        };
        if self.asked.len() >= PAGES_MAX || !self.asked.insert(url.to_string()) {
            return Err(protocol(&self.request, "a list of pages that does not end".to_owned()));
        }
        let call = Call::new(Method::GET, url, std::slice::from_ref(&self.scope), self.request.clone());
        let response = self.host.send(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.host.failure(response, &self.request).await);
        }
        if let Some(url) = next_page(response.headers(), &call.url) {
            self.next = Next::Page(url);
        }
        let patience = self.host.options.read_timeout;
        let body = http::read_capped(response, MANIFEST_CAP, patience, &self.request).await?;
        let unusable = |problem: String| protocol(&self.request, problem);
        let body: serde_json::Value =
            serde_json::from_slice(&body).map_err(|error| unusable(format!("not JSON: {error}")))?;
        match body.get(self.field) {
            // Go writes an empty list as null: a repository without tags.
            None | Some(serde_json::Value::Null) => Ok(Some(Vec::new())),
            Some(names) => serde_json::from_value(names.clone())
                .map(Some)
                .map_err(|error| unusable(format!("{} is no list of names: {error}", self.field))),
        }
    }

    /// All names that are left.
    pub async fn all(mut self) -> Result<Vec<String>, RegistryError> {
        let mut names = Vec::new();
        while let Some(page) = self.page().await? {
            names.extend(page);
            if names.len() > NAMES_MAX {
                return Err(protocol(&self.request, format!("a list of more than {NAMES_MAX} names")));
            }
        }
        Ok(names)
    }
}

/// Where the next page is (RFC 8288): `</v2/_catalog?last=x&n=100>; rel="next"`.
pub(super) fn next_page(headers: &HeaderMap, asked: &Url) -> Option<Url> {
    let values = headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok());
    let target = values.flat_map(links).find(|(_, parameters)| is_next(parameters))?.0;
    let named = asked.join(target).ok()?;
    let mut next = asked.clone();
    next.set_path(named.path());
    next.set_query(named.query());
    Some(next)
}

/// The targets of a `Link` with their parameters. A target may hold commas, so that `<` begins one.
fn links(value: &str) -> Vec<(&str, &str)> {
    let parts = value.split('<').skip(1);
    parts.filter_map(|part| part.split_once('>')).collect()
}

fn is_next(parameters: &str) -> bool {
    parameters.split([';', ',']).filter_map(|parameter| parameter.split_once('=')).any(|(name, value)| {
        let mut relations = value.trim().trim_matches('"').split_ascii_whitespace();
        name.trim().eq_ignore_ascii_case("rel") && relations.any(|one| one.eq_ignore_ascii_case("next"))
    })
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[track_caller]
    fn check(link: &'static str, expected: Option<&str>) {
        let asked = Url::parse("https://r.example:5000/v2/app/tags/list?n=2").unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(LINK, HeaderValue::from_static(link));
        assert_eq!(next_page(&headers, &asked).as_ref().map(Url::as_str), expected, "{link}");
    }

    #[test]
    fn the_next_page_is_where_the_link_says_on_the_registry_itself() {
        let next = Some("https://r.example:5000/v2/app/tags/list?last=b&n=2");
        check("</v2/app/tags/list?last=b&n=2>; rel=\"next\"", next);
        check("</v2/app/tags/list?last=b&n=2>;rel=next", next);
        check("<?last=b&n=2>; title=\"x\"; REL=\"last next\"", next);
        check("<http://inside:80/v2/app/tags/list?last=b&n=2>; rel=\"next\"", next);
        check("</first>; rel=\"first\", </v2/app/tags/list?last=b&n=2>; rel=\"next\"", next);
        let comma = Some("https://r.example:5000/v2/app/tags/list?last=a,b");
        check("</v2/app/tags/list?last=a,b>; rel=\"next\"", comma);
        check("</v2/app/tags/list>; rel=\"prev\"", None);
        check("nonsense", None);
    }
}
