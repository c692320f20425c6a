//! `AssumeRole` of a token service, narrowed by a policy to what was asked for.

use std::{fmt::Write as _, time::Duration};

use jiff::Timestamp;
use ring::{digest, hmac};
use serde::Deserialize;

use super::{LendingError, lending::Wish};
use crate::{
    origin::{Keys, Secret, StoreSettings},
    reference::UserName,
};

/// The token service answers, or keys are not lent.
const DEADLINE: Duration = Duration::from_secs(10);
const MOST: usize = 64 << 10;
/// What token services accept.
const SHORTEST: Duration = Duration::from_secs(900);

/// A role, and who may take it on.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Role {
    /// `https://sts.eu-west-1.amazonaws.com`, or a store's own endpoint.
    endpoint: String,
    #[serde(default = "region")]
    region: String,
    /// `arn:aws:iam::…:role/…`
    role: String,
    /// The control plane's own keys.
    keys: StoreSettings,
}

fn region() -> String {
    "us-east-1".to_owned()
}

/// Allows what the wish needs and nothing else. Objects are named by the digests of their bytes, so who
/// reads one tree and may list nothing can name the objects of that version only.
pub(super) fn policy(bucket: &str, prefix: &str, wish: Wish<'_>) -> String {
    let below = if prefix.is_empty() {
        String::new()
    } else {
        format!("{prefix}/")
    };
    let arn = |key: &str| format!("arn:aws:s3:::{bucket}/{below}{key}");
    let statement = |actions: &[&str], resources: &[String]| serde_json::json!({"Effect": "Allow", "Action": actions, "Resource": resources});
    let read = ["s3:GetObject", "s3:GetObjectVersion"];
    let statements = match wish {
        Wish::ReadTree(record) => {
            let tree = &record.tree;
            let parts = [Some(&tree.rows), tree.digests.as_ref(), tree.sums.as_ref()];
            let mut keys: Vec<String> = parts.into_iter().flatten().map(|part| arn(&part.key)).collect();
            keys.push(arn("objects/*"));
            vec![statement(&read, &keys)]
        }
        Wish::ReadObjects(_) => vec![statement(&read, &[arn("*")])],
        Wish::Publish => vec![
            statement(
                &[
                    "s3:GetObject",
                    "s3:PutObject",
                    "s3:AbortMultipartUpload",
                    "s3:ListMultipartUploadParts",
                ],
                &[arn("objects/*"), arn("trees/*")],
            ),
            // Without it, what is absent looks forbidden.
            statement(&["s3:ListBucket"], &[format!("arn:aws:s3:::{bucket}")]),
        ],
    };
    serde_json::json!({"Version": "2012-10-17", "Statement": statements}).to_string()
}

impl Role {
    pub async fn assume(&self, policy: &str, user: &UserName, life: Duration) -> Result<Keys, LendingError> {
        let failed = |reason: String| LendingError::TokenService {
            endpoint: self.endpoint.clone(),
            reason,
        };
        // A session's name: letters, digits and =,.@-_ of at most 64.
        let session: String = format!("grid-mount-{user}")
            .chars()
            .map(|c| if c == '+' { '-' } else { c })
            .take(64)
            .collect();
        let body = form(&[
            ("Action", "AssumeRole"),
            ("Version", "2011-06-15"),
            ("RoleArn", &self.role),
            ("RoleSessionName", &session),
            ("DurationSeconds", &life.max(SHORTEST).as_secs().to_string()),
            ("Policy", policy),
        ]);
        let url: url::Url = self
            .endpoint
            .parse()
            .map_err(|error: url::ParseError| failed(error.to_string()))?;
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            (None, _) => return Err(failed("its endpoint names no host".into())),
        };
        let key = |name: &str| self.keys.get(name).unwrap_or_default();
        let signed = sign(
            &Signing {
                host: &host,
                region: &self.region,
                id: key("AWS_ACCESS_KEY_ID"),
                secret: key("AWS_SECRET_ACCESS_KEY"),
                at: Timestamp::now(),
            },
            &body,
        );
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(DEADLINE)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let answer = client
            .post(url)
            .header("content-type", FORM)
            .header("x-amz-date", signed.date)
            .header("authorization", signed.authorization)
            .body(body)
            .send()
            .await
            .map_err(|error| failed(crate::causes::in_one_line(&error)))?;
        let status = answer.status();
        let bytes = answer
            .bytes()
            .await
            .map_err(|error| failed(crate::causes::in_one_line(&error)))?;
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]);
        if !status.is_success() {
            let message = element(&text, "Message").unwrap_or_default();
            return Err(failed(format!("{status} {message}")));
        }
        let part =
            |name: &str| element(&text, name).ok_or_else(|| failed(format!("its answer has no {name}")));
        Ok(Keys {
            id: part("AccessKeyId")?,
            secret: Secret::new(part("SecretAccessKey")?),
            token: Some(Secret::new(part("SessionToken")?)),
        })
    }
}

const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";

fn form(pairs: &[(&str, &str)]) -> String {
    url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs(pairs)
        .finish()
}

/// The text of the first element of that name; keys and tokens hold nothing that XML escapes but `&`.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.trim().replace("&amp;", "&"))
}

struct Signing<'a> {
    host: &'a str,
    region: &'a str,
    id: &'a str,
    secret: &'a str,
    at: Timestamp,
}

struct Signed {
    date: String,
    authorization: String,
}

/// AWS Signature Version 4 of a POST of a form to `/`.
fn sign(with: &Signing<'_>, body: &str) -> Signed {
    let date = with.at.strftime("%Y%m%dT%H%M%SZ").to_string();
    let day = &date[..8];
    let scope = format!("{day}/{}/sts/aws4_request", with.region);
    let headers = "content-type;host;x-amz-date";
    let canonical = format!(
        "POST\n/\n\ncontent-type:{FORM}\nhost:{}\nx-amz-date:{date}\n\n{headers}\n{}",
        with.host,
        hex(digest::digest(&digest::SHA256, body.as_bytes()).as_ref())
    );
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{date}\n{scope}\n{}",
        hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref())
    );
    let mac = |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes());
    let mut key = mac(format!("AWS4{}", with.secret).as_bytes(), day);
    for part in [with.region, "sts", "aws4_request"] {
        key = mac(key.as_ref(), part);
    }
    let signature = hex(mac(key.as_ref(), &to_sign).as_ref());
    Signed {
        authorization: format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={headers}, Signature={signature}",
            with.id
        ),
        date,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
