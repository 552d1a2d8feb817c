//! What goes wrong in a plan, and when.

use std::collections::BTreeSet;

use super::{Anchor, Fault, LateLink, LinkKind, Loss, PeerKind, Plan, Rng, Side, Wire, draw_drop};

pub(super) fn draw_second(rng: &mut Rng, total_pages: u64) -> Option<(Side, u64, Wire)> {
    let from = rng.pick(&[Side::Source, Side::Target]);
    let at = match from {
        Side::Source => rng.below(total_pages * 6000),
        Side::Target => rng.below(80),
    };
    let cut = Wire::Cut { both: rng.one_in(2), grace: rng.pick(&[0, 9000]) };
    let wire = rng.pick(&[cut, Wire::Reset, Wire::Stall]);
    rng.one_in(4).then_some((from, at, wire))
}

pub(super) fn draw_fault(rng: &mut Rng, total_pages: u64, link: LinkKind) -> Option<Fault> {
    let late = matches!(link, LinkKind::Late(_));
    // Most of what can go wrong in the last moments needs a place near them.
    let anchor = if rng.one_in(2) { Anchor::Pause } else { Anchor::Start };
    let steps = match anchor {
        Anchor::Start => rng.below_one_of(&[10, 100, 1500]),
        Anchor::Pause => rng.below_one_of(&[20, 150]),
    };
    Some(match rng.below(20) {
        0..=2 => return None,
        3..=10 => {
            let from = rng.pick(&[Side::Source, Side::Source, Side::Target]);
            let at = match (from, anchor) {
                (Side::Source, Anchor::Start) => rng.below_one_of(&[200, total_pages * 6000]),
                (Side::Source, Anchor::Pause) => rng.below_one_of(&[600, 1500, 20_000]),
                (Side::Target, Anchor::Start) => rng.below(80),
                (Side::Target, Anchor::Pause) => rng.below(16),
            };
            let wire = match rng.below(6) {
                0 | 1 => Wire::Cut { both: rng.one_in(2), grace: rng.pick(&[0, 50, 9000]) },
                2 => Wire::Reset,
                3 => Wire::Stall,
                _ => Wire::Flip(rng.below(8) as u8),
            };
            Fault::Wire { from, anchor, at, wire }
        }
        11 | 12 => {
            Fault::Cancel { side: rng.pick(&[Side::Source, Side::Source, Side::Target]), anchor, at: steps }
        }
        13 => Fault::Kill { anchor, at: steps },
        14 => Fault::Log { call: rng.below_one_of(&[2, 40]) },
        15 => Fault::Pause { stands: rng.one_in(2) },
        16 => rng.pick(&[Fault::Save, Fault::Load]),
        17 => Fault::Start,
        _ if late => Fault::Link { call: rng.below(40) },
        18 => Fault::Log { call: rng.below_one_of(&[2, 8]) },
        _ => Fault::Kill { anchor, at: steps },
    })
}

impl Plan {
    /// A seed's guest that goes to a ramwire by a plain stream, or first with page channels or by RDMA, whose connections are
    /// lost again and again.
    pub(in crate::session::sim) fn lossy(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x1055);
        let plan = Self::of(seed);
        let batch_pages = rng.pick(&[1, 7, 64]);
        let link = match plan.link {
            LinkKind::Late(link) if link.barrier.is_some() => plan.link,
            LinkKind::Late(link) => {
                LinkKind::Late(LateLink { registers: true, confirms: true, fence_waits: true, ..link })
            }
            LinkKind::Inline { .. } => LinkKind::Inline { batch_pages },
        };
        let beside = matches!(link, LinkKind::Late(_));
        let fault = match rng.below(8) {
            0 => Some(Fault::Cancel { side: Side::Source, anchor: Anchor::Start, at: rng.below(1500) }),
            1 => Some(Fault::Kill { anchor: Anchor::Start, at: rng.below(1500) }),
            // A page channel alone, or a NIC.
            2 | 3 if beside => Some(Fault::Link { call: rng.below_one_of(&[20, 80]) }),
            _ => None,
        };
        let first = if beside { First::Beside } else { First::InStream };
        let nth = |at| if at == 0 { first } else { First::No };
        let losses =
            (0..1 + rng.below(5)).map(|at| draw_loss(&mut rng, plan.total_pages(), nth(at))).collect();
        Self {
            losses,
            delta_pages: Rng::new(seed ^ 0xde17a).pick(&[0, 16, 128]),
            peer: rng.pick(&[PeerKind::Greeted, PeerKind::Ramwire]),
            drops: draw_drop(seed, link, PeerKind::Ramwire),
            link,
            watched: false,
            fault,
            also: None,
            not_resumed: false,
            hint_every: 0,
            plugs: Vec::new(),
            unplugged: BTreeSet::new(),
            passed: BTreeSet::new(),
            ..plan
        }
    }

    /// A seed's guest whose connections are all lost when the ends have agreed to go on over them.
    pub(in crate::session::sim) fn lost_for_ever(seed: u64) -> Self {
        let lossy = Self::lossy(seed);
        let (from, anchor, wire) = (Side::Source, Anchor::Start, Wire::Cut { both: true, grace: 0 });
        let first = Loss { from, anchor, at: lossy.total_pages() * 2000, wire };
        // Within the first page.
        let later = Loss { from, anchor, at: 600, wire };
        let link = LinkKind::Inline { batch_pages: 7 };
        let losses = vec![first, later];
        Self { losses, lost_for_ever: true, link, drops: None, fault: None, zero_every: 1000, ..lossy }
    }
}

/// Whether a connection is the first one, and where its pages go. Others begin with RESUME, and carry them in the stream.
#[derive(Clone, Copy, PartialEq)]
enum First {
    InStream,
    Beside,
    No,
}

/// How a connection is lost.
fn draw_loss(rng: &mut Rng, total_pages: u64, first: First) -> Loss {
    let anchor = if rng.one_in(2) { Anchor::Pause } else { Anchor::Start };
    let from = rng.pick(&[Side::Source, Side::Source, Side::Target]);
    let at = match (from, anchor) {
        (Side::Source, Anchor::Start) if first == First::No && rng.one_in(3) => rng.below(90),
        (Side::Source, Anchor::Start) if first == First::Beside => rng.below_one_of(&[2000, 6000]),
        (Side::Source, Anchor::Start) => rng.below_one_of(&[total_pages * 1500, total_pages * 6000]),
        (Side::Source, Anchor::Pause) => rng.below_one_of(&[600, 1500, 20_000]),
        (Side::Target, Anchor::Start) => rng.below_one_of(&[120, 400]),
        (Side::Target, Anchor::Pause) => rng.below(40),
    };
    let wire = match rng.below(4) {
        0 | 1 => Wire::Cut { both: rng.one_in(2), grace: rng.pick(&[0, 50, 9000]) },
        2 => Wire::Reset,
        _ => Wire::Stall,
    };
    Loss { from, anchor, at, wire }
}
