"""Which hand-written responses count as verifying, re-deriving or correcting themselves, and which only look so."""

import time

import pytest

from fipo_megatron.evaluation.reflection import find_reflection, reflection_rates


@pytest.mark.parametrize(
    "text",
    [
        "So x = 4. Let me check: 4 + 3 = 7.",
        "Let's verify this by substitution.",
        "This verifies the claim.",
        "VERIFICATION: 2 + 2 = 4",
        "I'll double-check the sum.",
        "Double checking gives the same.",
        "A quick sanity check confirms it.",
        "Rechecking: 12.",
        "We re-check the last column.",
        "Let\N{RIGHT SINGLE QUOTATION MARK}s quickly check that n is prime.",
        "We should check whether 7 divides it.",
        "Checking our work, we find 5.",
        "Check: 3 * 4 = 12.",
        "Plugging this value back into the equation gives 0.",
        "Substitute x = 2 back.",
    ],
)
def test_verification(text: str) -> None:
    assert find_reflection(text).verifies


@pytest.mark.parametrize(
    "text",
    [
        "Alternatively, use the quadratic formula.",
        "The sum is 9; alternatively we could count.",
        "Another way to see this is by symmetry.",
        "Let me try a different approach.",
        "Counting in a different way gives 12.",
        "Re-deriving the bound, we get 3.",
        "Let me recalculate.",
        "I will recompute the last term.",
        "Let me redo this.",
        "Let us start over.",
        "We solve it again with y = 1.",
    ],
)
def test_rederivation(text: str) -> None:
    assert find_reflection(text).rederives


@pytest.mark.parametrize(
    "text",
    [
        "Wait, that has the wrong sign.",
        "So it is 12.\nWait... 13.",
        "The area is 5 - wait, no, 6.",
        "x = 3. But wait, x must be even.",
        "Hmm, wait. The order matters.",
        "Wait! Minutes, not hours.",
        "Wait a minute, 9 is not prime.",
        "Actually, the second root is negative.",
        "It is 7. Oh, actually it is 8.",
        "Hold on, I dropped a term.",
        "Scratch that.",
        "I made a sign error above.",
        "I was wrong about the base case.",
        "No, that\N{RIGHT SINGLE QUOTATION MARK}s incorrect.",
        "Let me reconsider the case n = 1.",
    ],
)
def test_correction(text: str) -> None:
    assert find_reflection(text).corrects


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7345+5128=\nAnswer: 12473",
        "Two friends play checkers on a checkered board.",
        "She writes a check for $40 and pays with another check.",
        "The guards check 30 bags an hour.",
        "They await the train and waited 5 minutes.",
        "Passengers wait for the bus. He had to wait.",
        "First, wait 5 minutes. Then, wait until noon; wait times vary.",
        "The waiter brings 3 plates.",
        "How many were actually sold?",
        "The actuality and factually are other words.",
        "In how many different ways can it be done?",
        "Another wayfarer arrives on a different day.",
        "He holds on to the rope. Hold on to it.",
        "Trees alternate; the signs are taken alternately.",
        "The redoubt holds 20 men.",
        "The correct answer is 5, the wrong one 6.",
    ],
)
def test_false_friends(text: str) -> None:
    found = find_reflection(text)
    assert (found.verifies, found.rederives, found.corrects) == (False, False, False)


def test_the_three_are_told_apart() -> None:
    assert find_reflection("Let me verify.").__dict__ == {"verifies": True, "rederives": False, "corrects": False}
    assert find_reflection("Another way:").__dict__ == {"verifies": False, "rederives": True, "corrects": False}
    assert find_reflection("Wait, no.").__dict__ == {"verifies": False, "rederives": False, "corrects": True}


def test_rates_count_a_response_once() -> None:
    responses = ["Wait, let me verify. Wait, let me verify it.", "Verify it.", "It is 4.", "Alternatively, 5."]
    assert reflection_rates([find_reflection(response) for response in responses]) == {
        "verifies_frac": 0.5,
        "rederives_frac": 0.25,
        "corrects_frac": 0.25,
        "reflects_frac": 0.75,
    }


def test_no_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="reflections: there are none"):
        reflection_rates([])


@pytest.mark.parametrize("piece", ["\n", "\n ", "no, ", "Hmm\n\n", "so ", "but, but\n"])
def test_time_does_not_grow_with_the_square_of_the_length(piece: str) -> None:
    start = time.perf_counter()
    find_reflection(piece * (200_000 // len(piece)))
    assert time.perf_counter() - start < 5  # minutes, before repetitions had limits
