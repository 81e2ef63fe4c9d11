//! A token server as registries refer to (distribution, "Token Authentication Specification"), whose tokens a real registry believes.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::certificates::{Certificates, text};
use crate::http::{Request, Response, pairs};
use crate::server::Server;
use crate::tools::{pipe, read};

/// Who may have tokens, and what is odd about them.
#[derive(Clone, Debug, Default)]
pub struct TokenRules {
    /// Passwords by user.
    pub users: HashMap<String, String>,
    /// Identity tokens (docker's `identitytoken`) that are good.
    pub identity_tokens: Vec<String>,
    /// Those without a name may pull.
    pub anonymous_pull: bool,
    /// Answers carry `access_token` in place of `token`.
    pub access_token: bool,
    /// POST is answered with 404, as by servers that do not know OAuth2.
    pub no_post: bool,
    /// The next so many tokens ran out long ago.
    pub expired: usize,
    /// A body in place of a token's.
    pub body: Option<Vec<u8>>,
}

/// The server; dereferences to its [`Server`].
pub struct TokenServer {
    server: Server,
    rules: Arc<Mutex<TokenRules>>,
}

/// The name by which registry and token server know each other.
pub const SERVICE: &str = "occy test registry";
/// The issuer of tokens.
pub const ISSUER: &str = "occy test issuer";

impl TokenServer {
    /// Starts to serve `/token`.
    pub fn start(rules: TokenRules) -> Self {
        let rules = Arc::new(Mutex::new(rules));
        let shared = Arc::clone(&rules);
        let server =
            Server::start(move |request| handle(request, &mut shared.lock().expect("no handler panics")));
        Self { server, rules }
    }

    /// With one user.
    pub fn with_user(user: &str, password: &str) -> Self {
        Self::start(TokenRules {
            users: HashMap::from([(user.to_owned(), password.to_owned())]),
            ..TokenRules::default()
        })
    }

    /// The URL that a registry refers to.
    pub fn realm(&self) -> String {
        format!("http://{}/token", self.host())
    }

    /// Changes the rules.
    pub fn change(&self, change: impl FnOnce(&mut TokenRules)) {
        change(&mut self.rules.lock().expect("no handler panics"));
    }

    /// How many tokens were asked for.
    pub fn requests(&self) -> usize {
        self.count("*", "/token")
    }
}

impl Deref for TokenServer {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

fn handle(request: &Request, rules: &mut TokenRules) -> Response {
    if !request.path.starts_with("/token") {
        return Response::status(404);
    }
    if let Some(body) = &rules.body {
        return Response::ok("application/json", body.clone());
    }
    let form = pairs(&String::from_utf8_lossy(&request.body));
    let (scopes, known) = if request.method == "POST" {
        if rules.no_post {
            return Response::status(404);
        }
        let field = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let refresh = field("refresh_token").unwrap_or_default();
        (field("scope").into_iter().collect(), Some(rules.identity_tokens.contains(&refresh)))
    } else {
        let known = request
            .get("Authorization")
            .map(|basic| rules.users.iter().any(|(user, password)| basic_header(user, password) == basic));
        (request.query("scope"), known)
    };
    let push = match known {
        Some(true) => true,
        Some(false) => return Response::status(401),
        None if rules.anonymous_pull => false,
        None => return Response::status(401),
    };
    let lifetime = if rules.expired > 0 {
        rules.expired -= 1;
        -3600
    } else {
        300
    };
    let scopes: Vec<&str> =
        scopes.iter().flat_map(|scope| scope.split(' ')).filter(|scope| !scope.is_empty()).collect();
    let name = if rules.access_token { "access_token" } else { "token" };
    Response::ok(
        "application/json",
        json!({name: mint(&scopes, push, lifetime), "expires_in": 300}).to_string(),
    )
}

/// `Basic …`.
pub fn basic_header(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// A token for what the scopes ask, without `push` where that is not allowed, signed by the run's token key.
pub fn mint(scopes: &[&str], push: bool, lifetime: i64) -> String {
    let access: Vec<Value> = scopes.iter().filter_map(|scope| grant(scope, push)).collect();
    // As with real servers, no two tokens are the same.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let serial = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs();
    let now = i64::try_from(now).expect("a clock of this age");
    let certificates = Certificates::shared();
    let certificate = String::from_utf8(read(certificates.path("token.crt"))).expect("PEM");
    let certificate: String = certificate.lines().filter(|line| !line.starts_with("-----")).collect();
    let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]});
    let claims = json!({"iss": ISSUER, "sub": "someone", "aud": SERVICE, "exp": now + lifetime,
        "nbf": now - 7200, "iat": now - 7200, "jti": serial, "access": access});
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", encode(&header), encode(&claims));
    let key = text(&certificates.path("token.key"));
    let signature = pipe("openssl", ["dgst", "-sha256", "-sign", &key], signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn grant(scope: &str, push: bool) -> Option<Value> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    let actions: Vec<&str> = actions.split(',').filter(|action| push || *action == "pull").collect();
    Some(json!({"type": kind, "name": name, "actions": actions}))
}
