#![allow(clippy::unwrap_used)]
use super::*;

#[test]
fn orders_and_answers_survive_the_wire() {
    let hello = Hello {
        urgent: true,
        passes: true,
        fingerprints: true,
        secret: Some([9; 16]),
        ..Hello::ours([7; 16], true)
    };
    let resume = Resume { migration_id: [7; 16], secret: [9; 16], attempt: 3, purpose: Purpose::AskForGuest };
    let orders = [
        Order::Hello(hello),
        Order::StateSent,
        Order::Digest { first: 9, values: &[1; 16] },
        Order::Commit { migration_id: [3; 16] },
        Order::Unsent { block: 2, why: Unsent::Free, ranges: &[1; 32] },
        Order::Unsent { block: 0, why: Unsent::Unplugged, ranges: &[1; 16] },
        Order::Sent { counts: &[2; 48] },
        Order::VmmConfiguration { part: b"{}" },
        Order::Memory { start: 4096, len: 1 << 30, block: "pc.ram" },
        Order::Fingerprints { block: 1, first: 7, values: &[3; 24] },
        Order::MemoryCheck(Finding::Equal { pages: 9 }),
        Order::MemoryCheck(Finding::Differs { block: 1, range: Range { first: 2, pages: 3 }, pages: 4 }),
        Order::MemoryCheck(Finding::NotMade),
        Order::Fence { number: 1 << 40 },
        Order::Resume(resume),
        Order::Resume(Resume { purpose: Purpose::GoOn, ..resume }),
        Order::Resume(Resume { purpose: Purpose::GiveUp, ..resume }),
        Order::Hello(Hello { secret: None, ..hello }),
        Order::Hello(Hello { has_memory: true, passes: false, secret: None, ..hello }),
    ];
    for order in orders {
        let mut body = Vec::new();
        order.encode_body(&mut body);
        assert_eq!(decode_order(order.number(), &body), Some(order));
    }
    let long = "ä".repeat(500);
    let words = [
        Answer::Ready,
        Answer::Running,
        Answer::Working,
        Answer::Refused { why: "no" },
        Answer::Fenced { number: 7 },
        Answer::Holds { secret: [4; 16], fence: 9 },
    ];
    for answer in words.into_iter().chain([Answer::Hello(hello)]) {
        let mut body = Vec::new();
        answer.encode_body(&mut body);
        assert_eq!(decode_answer(answer.number(), &body), Some(answer));
    }
    let mut body = Vec::new();
    Answer::Refused { why: &long }.encode_body(&mut body);
    assert_eq!(decode_answer(FIRST_NUMBER + 4, &body), Some(Answer::Refused { why: &long[..400] }));
}

#[test]
fn malformed_bodies_are_refused() {
    let cases: [(u16, &[u8]); 28] = [
        (11, &[0; 7]),
        (11, &[0; 9]),
        (12, &[0; Resume::LEN + 1]),
        (12, &[3; Resume::LEN]),
        (8, b""),
        (8, &[1; 16]),
        (8, &[0; 17]),
        (8, b"starting\0\0\0\0\0\0\0\x01\xff"),
        (9, b""),
        (9, &[0; 12]),
        (9, &[0; 13]),
        (9, &[0; 12 + 8 * (MAX_FINGERPRINTS + 1)]),
        (10, b"\x03"),
        (10, b"\x01aaaabbbb"),
        (7, b""),
        (7, &[0; MAX_CONFIGURATION_PART + 1]),
        (6, b""),
        (6, &[0; page_counts::LEN - 1]),
        (6, &[0; page_counts::LEN * (MAX_COUNTS + 1)]),
        (5, b"\0\0\0\0\0"),
        (5, b"\0\0\0\0\x02aaaabbbbccccdddd"),
        (0, b""),
        (1, b"\0\x01"),
        (2, b"x"),
        (3, b"\0\0\0\0"),
        (3, b"\0\0\0\0\x01"),
        (4, b""),
        (13, b""),
    ];
    for (number, body) in cases {
        assert_eq!(decode_order(FIRST_NUMBER + number, body), None, "{number} {body:?}");
    }
    assert_eq!(decode_order(1, b""), None);
    let mut short = [0; 21];
    short[20] = 32;
    assert_eq!(decode_order(FIRST_NUMBER + 1, &short), None, "a secret that is announced and missing");
    assert_eq!(decode_answer(FIRST_NUMBER + 2, b"x"), None);
    assert_eq!(decode_answer(FIRST_NUMBER + 4, b"\xff"), None);
    let too_many = vec![0; 4 + 8 * (MAX_DIGESTS + 1)];
    assert_eq!(decode_order(FIRST_NUMBER + 3, &too_many), None);
}

#[test]
fn versions_meet_at_the_newest_common_one() {
    let hello = |min_version, max_version| Hello { min_version, max_version, ..Hello::ours([0; 16], false) };
    assert_eq!(hello(1, 6).common_version(), Some(5));
    assert_eq!(hello(1, 4).common_version(), Some(4));
    assert_eq!(hello(1, 2).common_version(), Some(2));
    assert_eq!(hello(6, 7).common_version(), None);
    assert_eq!(hello(1, 1).common_version(), None, "it would not tell what it has sent");
    assert_eq!(hello(0, 0).common_version(), None);
    assert_eq!(version_of_pong(hello_pong(1)), Some(1));
    assert_eq!(version_of_pong(GREETING), None);
}

#[test]
fn a_number_of_channels_survives_the_wire() {
    for channels in [0, 1, 255] {
        assert_eq!(channels_of_ping(channels_ping(channels)), Some(channels));
    }
    for other in [GREETING, hello_pong(2), 1, 0] {
        assert_eq!(channels_of_ping(other), None);
    }
}
