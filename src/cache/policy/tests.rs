use proptest::prelude::*;

use super::*;

fn unit(n: u8, sealed: bool) -> Unit {
    let id = ObjectId::derive("team", "s3://b", "key", &n.to_string(), 1, None);
    match sealed {
        true => Unit::object(id),
        false => Unit::extent(id, ExtentNo(0)),
    }
}

proptest! {
    /// What was written down leads to the order that is there: in the list exactly, and in the window.
    #[test]
    fn the_moves_lead_to_the_order(
        ops in prop::collection::vec((0u8..8, 0u8..60), 1..400), cut in 0usize..400
    ) {
        let mut policy = Policy::new(40 * EXTENT_SIZE);
        let mut snapshot = Vec::new();
        for (at, (op, n)) in ops.into_iter().enumerate() {
            let unit = unit(n, false);
            match op {
                0..=2 => policy.insert(unit, EXTENT_SIZE, Purpose::Reader),
                3 => policy.insert(unit, EXTENT_SIZE, Purpose::Readahead),
                4 => policy.reference(unit, EXTENT_SIZE),
                5 => policy.remove(&unit),
                6 => {
                    let victim = policy.victim();
                    if let Some(victim) = victim.filter(|_| n % 2 == 0) { policy.keep(victim); }
                }
                _ => policy.seal(self::unit(n, true), std::iter::once(unit)),
            }
            if at == cut {
                snapshot = policy.order().collect();
                policy.forget_moves();
            }
        }
        let order = moved(snapshot, policy.take_moves().unwrap().into_iter());
        prop_assert_eq!(order.len(), policy.len());
        for list in [&policy.list, &policy.window] {
            let told: Vec<Unit> = order.iter().filter(|unit| list.contains(unit)).copied().collect();
            let there: Vec<Unit> = list.iter().map(|(unit, _)| *unit).collect();
            prop_assert_eq!(told, there);
        }
    }
}

#[test]
fn too_many_moves_are_lost_and_known_to_be() {
    let mut policy = Policy::new(40 * EXTENT_SIZE);
    for _ in 0..=MOVES_MOST {
        policy.keep(unit(1, false));
    }
    assert!(policy.has_moved() && policy.take_moves().is_none());
    policy.forget_moves();
    assert_eq!(policy.take_moves(), Some(Vec::new()));
}

#[test]
fn what_was_learned_is_the_same_after_a_restart() {
    let mut policy = Policy::new(EXTENT_SIZE);
    policy.insertion = Insertion::Remembering;
    policy.shadows[1].score = 77;
    let learned = policy.learned();
    let mut again = Policy::new(EXTENT_SIZE);
    assert_ne!(again.learned(), learned);
    again.recall(Learned::decode(&learned.encode()));
    assert_eq!(again.learned(), learned);
}
