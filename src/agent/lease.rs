//! Telling the catalog that a version is mounted here, for as long as it is.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::task::JoinHandle;

use crate::{
    catalog::{Catalog, Lease, LeaseId},
    causes::in_one_line,
    reference::PinnedReference,
};

/// An unmount waits no longer than this for the catalog to hear of it; then the lease runs out by itself.
const GOODBYE: Duration = Duration::from_secs(2);
/// After a failure, and at most between two renewals.
const PAUSE: Duration = Duration::from_secs(30);

/// One mount's lease. Dropped without [`Held::release`], it runs out by time.
pub(super) struct Held {
    catalog: Arc<dyn Catalog>,
    lease: Lease,
    renewing: JoinHandle<()>,
}

/// Says that the version is mounted, and says it again until it is released.
pub(super) fn hold(
    catalog: &Arc<dyn Catalog>,
    reference: PinnedReference,
    since: Timestamp,
    runtime: &tokio::runtime::Handle,
) -> Held {
    // The catalog knows better who I am.
    let user = catalog.me().unwrap_or(&reference.name.owner).clone();
    let lease = Lease {
        id: LeaseId::random(),
        reference,
        user,
        host: host(),
        since,
        expires: since,
    };
    let renewing = runtime.spawn(renew(Arc::clone(catalog), lease.clone()));
    Held {
        catalog: Arc::clone(catalog),
        lease,
        renewing,
    }
}

/// Ends where the catalog wants to hear nothing.
async fn renew(catalog: Arc<dyn Catalog>, lease: Lease) {
    loop {
        let pause = match catalog.hold(&lease).await {
            Ok(None) => return,
            // Two renewals may be lost before it runs out.
            Ok(Some(life)) => life / 3,
            Err(error) => {
                tracing::debug!(reference = %lease.reference, error = in_one_line(&error), "no lease");
                PAUSE
            }
        };
        let pause = pause.clamp(Duration::from_millis(200), 10 * PAUSE);
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.0))).await;
    }
}

impl Held {
    pub(super) async fn release(self) {
        // A store keeps no leases: nobody has to be told.
        if self.renewing.is_finished() {
            return;
        }
        self.renewing.abort();
        let told = tokio::time::timeout(GOODBYE, self.catalog.release(&self.lease)).await;
        if !matches!(told, Ok(Ok(()))) {
            tracing::debug!(reference = %self.lease.reference, "the lease has to run out by itself");
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

fn host() -> String {
    let name = nix::unistd::gethostname().ok();
    let name = name.and_then(|name| name.into_string().ok()).unwrap_or_default();
    let visible: String = name.chars().filter(char::is_ascii_graphic).take(255).collect();
    if visible.is_empty() {
        "unknown".to_owned()
    } else {
        visible
    }
}
