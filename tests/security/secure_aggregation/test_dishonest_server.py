"""A server that does not keep to the protocol: every honest site refuses, says why, and gives nothing away."""

import base64
import json

import numpy as np
import pytest

from core_training.foundation.errors import InputError, ProtocolError
from security.secure_aggregation.graph import to_bits
from security.secure_aggregation.messages import MOST_SLOTS, Attempt, Dealt, Keys, Masked, sign
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import Minimums, Terms
from tests.security.secure_aggregation.federation import CONTEXT, DEFAULT, RUN, Federation, identity, roster_of

COUNT = 5  # four of them open a sum


class Ready:
    """Five sites that have set up a batch of three slots, and the orders of an honest server."""

    def __init__(self, terms=DEFAULT):
        self.federation = Federation(COUNT, terms)
        self.names = self.federation.names
        self.batch = ServerBatch(RUN, 0, 3, self.federation.roster, terms)
        for name in self.names:
            self.batch.add_keys(name, self.federation.answer(name, "keys", self.batch.keys_order()))
        self.shares = self.batch.shares_orders()
        for name in self.names:
            self.batch.add_shares(name, self.federation.answer(name, "shares", self.shares[name]))
        self.federation.batch = self.batch
        self.vectors = self.federation.vectors()
        self.opened = self.federation.begin()

    def mask_all(self):
        for name in self.names:
            self.opened.add(name, *self.federation.mask(self.opened, name, self.vectors[name]))
        self.unmask = self.opened.unmask_orders()
        return self

    def refuse(self, name, step, order, match):
        """The site refuses, and is as it was before."""
        site = self.federation.sites[name]
        before = site.record
        with pytest.raises(ProtocolError, match=match):
            site.answer(step, order if isinstance(order, bytes) else json.dumps(order).encode())
        assert site.record == before

    def refuse_mask(self, name, match, order=None, round=1, context=CONTEXT, change=0):
        """The site refuses to mask; no value of its vector has been masked a second time."""
        site = self.federation.sites[name]
        before, vector = site.record, self.vectors[name] + np.uint16(change)
        kept = vector.copy()
        with pytest.raises(ProtocolError, match=match):
            site.mask(round, order or self.opened.mask_order(name), context, vector)
        assert site.record == before
        assert vector.tolist() in (kept.tolist(), [0] * len(kept))

    def goes_on(self):
        """The honest orders are still answered, and give the sum."""
        for name, order in self.unmask.items():
            self.opened.add_unmasked(name, self.federation.answer(name, "unmask", order))
        np.testing.assert_array_equal(self.opened.finish(), self.federation.plain_sum(self.vectors, self.names))


def bits(ready, names):
    return base64.b64encode(to_bits(names, ready.federation.roster)).decode()


# Set-up


def test_keys_that_the_server_made_or_changed_are_refused():
    ready = Ready()
    for name in ready.names:
        order = json.loads(ready.shares[name])
        victim = ready.names.index(name) - 1
        for forge in (
            lambda document: document["mask"].reverse(),
            lambda document: document["seal"].reverse(),
            lambda document: document.update(site="another"),
        ):
            changed = json.loads(ready.shares[name])
            forge(changed["keys"][victim]["document"])
            ready.refuse(name, "shares", changed, "signature")
        own = Keys.model_validate_json(json.dumps(order["keys"][victim]["document"]))
        order["keys"][victim] = sign(own, identity("the server")).model_dump()
        ready.refuse(
            name, "shares", order, f"signature is not of the key that the roster has for {ready.names[victim]}"
        )


def test_keys_of_another_batch_another_site_or_the_sites_own_earlier_ones_are_refused():
    ready = Ready()
    stale = {name: json.loads(ready.shares[name])["keys"] for name in ready.names}
    later = ServerBatch(RUN, 1, 3, ready.federation.roster, ready.federation.terms)
    for name in ready.names:
        later.add_keys(name, ready.federation.answer(name, "keys", later.keys_order()))
    for place, name in enumerate(ready.names):
        order = later.shares_orders()[name]
        other = place - 1
        for changed, match in (
            ((other, stale[name][other]), f"keys of {ready.names[other]}: 'batch' is not"),
            ((other, json.loads(order)["keys"][place]), "signature"),
            ((place, stale[name][place]), f"keys of {name}: 'batch' is not"),
        ):
            bad = json.loads(order)
            bad["keys"][changed[0]] = changed[1]
            ready.refuse(name, "shares", bad, match)
        ready.refuse(name, "shares", ready.shares[name], "'batch' is not")
        first = ready.federation.answer(name, "keys", later.keys_order())
        ready.federation.answer(name, "keys", later.keys_order())
        bad = json.loads(order)
        bad["keys"][place] = json.loads(first)
        ready.refuse(name, "shares", bad, "not its latest")


def test_another_run_roster_or_other_terms_are_refused_before_any_key_is_made():
    ready = Ready()
    roster, terms = ready.federation.roster, ready.federation.terms
    one_more = {**roster, **roster_of(["the server's own site"])}
    for batch, field in (
        (ServerBatch("another run", 0, 3, roster, terms), "run"),
        (ServerBatch(RUN, 0, 3, one_more, terms), "roster"),
        (ServerBatch(RUN, 0, 3, roster, Terms(3, 3, 16, 1.0)), "terms"),
        (ServerBatch(RUN, 0, 3, roster, Terms(None, 2, 16, 1.0)), "terms"),
        (ServerBatch(RUN, 0, 3, roster, Terms(None, 3, 16, 9.0)), "terms"),
    ):
        for name in ready.names:
            ready.refuse(name, "keys", batch.keys_order(), f"'{field}' is not what it must be")


def test_no_order_has_a_site_make_keys_for_more_slots_than_a_batch_can_have():
    ready = Ready()
    order = json.loads(ready.batch.keys_order())
    for slots in (0, MOST_SLOTS + 1, 10**9):
        ready.refuse(ready.names[0], "keys", {**order, "slots": slots}, "order for keys: .*slots")


@pytest.mark.parametrize("field", ["site", "batch"])
def test_keys_that_a_site_in_league_signed_for_something_else_are_refused(field):
    ready = Ready()
    lie = "another" if field == "site" else ready.batch.batch.model_copy(update={"number": 7})
    for place, name in enumerate(ready.names):
        order = signed_otherwise(ready, Keys, ready.shares[name], "keys", place - 1, field, lie)
        ready.refuse(name, "shares", order, f"keys of {ready.names[place - 1]}: '{field}' is not what it must be")


def signed_otherwise(ready, model, order, part, place, field, lie):
    """The order, in which one site has signed another value of one field; who is in league with a server does."""
    changed = json.loads(order)
    said = model.model_validate_json(json.dumps(changed[part][place]["document"]))
    changed[part][place] = sign(said.model_copy(update={field: lie}), identity(ready.names[place])).model_dump()
    return changed


def test_a_cohort_below_the_minimum_or_without_the_site_is_refused():
    ready = Ready()
    for place, name in enumerate(ready.names):
        pair = [name, ready.names[place - 1]]
        for cohort, match in ((pair, "2 sites in the neighbourhood"), (ready.names[:place], "not in the cohort")):
            order = json.loads(ready.shares[name])
            order["cohort"] = bits(ready, cohort)
            order["keys"] = [order["keys"][ready.names.index(member)] for member in sorted(cohort)]
            ready.refuse(name, "shares", order, match)


def test_shares_are_dealt_among_one_cohort_only():
    ready = Ready()
    for place, name in enumerate(ready.names):
        order = json.loads(ready.shares[name])
        left_out = (place + 1) % COUNT
        order["cohort"] = bits(ready, [other for other in ready.names if other != ready.names[left_out]])
        del order["keys"][left_out]
        ready.refuse(name, "shares", order, "deals none twice")


def test_a_threshold_in_sites_that_is_too_small_a_share_of_the_cohort_is_refused():
    terms = Terms(threshold=3, minimum_sites=3, ring_bits=16, clip=1.0)
    federation = Federation(5, terms, Minimums(threshold=0.66))
    with pytest.raises(ProtocolError, match=r"threshold 3 of 5 sites: this site wants more than 0\.66 of them"):
        federation.set_up()
    with pytest.raises(InputError, match="minimum_sites 3: this site takes part from 4 up"):
        Federation(5, terms, Minimums(minimum_sites=4))


# Masking


def test_a_round_is_masked_once_whatever_the_slot_the_context_the_participants_or_the_vector():
    ready = Ready().mask_all()
    fewer = ServerRound(ready.batch, 0, 1, CONTEXT, 8, ready.names[1:])
    for name in ready.names[1:]:
        ready.refuse_mask(name, "another vector, or among other sites", change=1)
        ready.refuse_mask(name, "another vector, or among other sites", context=bytes(32))
        ready.refuse_mask(name, "another vector, or among other sites", order=fewer.mask_order(name))
        later = ServerRound(ready.batch, 1, 1, CONTEXT, 8, ready.names)
        ready.refuse_mask(name, "round 1: this site masked round 1, and none twice", order=later.mask_order(name))
    ready.goes_on()


def test_a_slot_is_masked_once_whatever_the_round():
    ready = Ready().mask_all()
    again = ServerRound(ready.batch, 0, 2, CONTEXT, 8, ready.names)
    for name in ready.names:
        ready.refuse_mask(
            name, "slot 0: this site masked slot 0, and none twice", order=again.mask_order(name), round=2
        )
    ready.goes_on()


def test_neither_slots_nor_rounds_go_back():
    ready = Ready()
    third = ServerRound(ready.batch, 2, 5, CONTEXT, 8, ready.names)
    for name in ready.names:
        ready.federation.mask(third, name, ready.vectors[name], round=5)
        first = ServerRound(ready.batch, 1, 6, CONTEXT, 8, ready.names).mask_order(name)
        ready.refuse_mask(name, "slot 1: this site masked slot 2", order=first, round=6)
        record = ready.federation.sites[name].record
        assert [seed is None for seed in record["seeds"]] == [True, True, False]


def test_a_slot_of_no_batch_another_round_and_another_batch_are_refused():
    ready = Ready()
    for name in ready.names:
        order = json.loads(ready.opened.mask_order(name))
        for field, value, match in (("slot", 3, "not of this batch"), ("batch", 1, "attempt"), ("run", "x", "attempt")):
            bad = json.dumps({**order, "attempt": {**order["attempt"], field: value}})
            ready.refuse_mask(name, match, order=bad)
        ready.refuse_mask(name, "'attempt' is not what it must be", round=2)
    ready.mask_all().goes_on()


def test_participants_below_the_threshold_or_outside_the_cohort_are_refused():
    ready = Ready()
    for place, name in enumerate(ready.names):
        others = [other for other in ready.names if other != name]
        for participants, match in (
            (sorted([name, *others[:2]]), "3 sites in the neighbourhood of .*: it takes 4"),
            (others, "not this site and others of its cohort"),
        ):
            order = json.loads(ready.opened.mask_order(name))
            order["participants"] = bits(ready, participants)
            order["dealt"] = [order["dealt"][ready.names.index(other)] for other in participants]
            ready.refuse_mask(name, match, order=json.dumps(order))
        order = json.loads(ready.opened.mask_order(name))
        del order["dealt"][place]
        ready.refuse_mask(name, "4 parts for this site's 5 holders", order=json.dumps(order))


@pytest.mark.parametrize("field", ["site", "batch", "cohort", "keys"])
def test_who_signed_that_it_dealt_something_else_is_masked_with_by_nobody(field):
    ready = Ready()
    lies = {"site": "another", "batch": ready.batch.batch.model_copy(update={"number": 7})}
    for place, name in enumerate(ready.names):
        mask_order = ready.opened.mask_order(name)
        order = signed_otherwise(ready, Dealt, mask_order, "dealt", place - 1, field, lies.get(field, bytes(32)))
        match = f"dealt of {ready.names[place - 1]}: '{field}' is not what it must be"
        ready.refuse_mask(name, match, order=json.dumps(order))


def test_participants_of_the_roster_who_are_not_in_the_cohort_are_refused():
    federation = Federation(6)
    federation.set_up(no_keys=federation.names[5:])
    opened = federation.begin()
    for name in opened.participants:
        order = json.loads(opened.mask_order(name))
        order["participants"] = base64.b64encode(to_bits(federation.names, federation.roster)).decode()
        with pytest.raises(ProtocolError, match="not this site and others of its cohort"):
            federation.sites[name].mask(1, json.dumps(order), CONTEXT, np.zeros(8, np.uint16))


def test_sites_that_were_shown_different_cohorts_do_not_mask_with_each_other():
    federation = Federation(6, Terms(4, 3, 16, 1.0))
    shown = [ServerBatch(RUN, 0, 1, federation.roster, federation.terms) for _ in range(2)]
    keys = {name: federation.answer(name, "keys", shown[0].keys_order()) for name in federation.names}
    for batch, cohort in zip(shown, (federation.names, federation.names[:5]), strict=True):
        for name in cohort:
            batch.add_keys(name, keys[name])
    orders = [batch.shares_orders() for batch in shown]
    dealt = {}
    for place, name in enumerate(federation.names):
        cohort = int(place < 2)
        dealt[name] = json.loads(federation.answer(name, "shares", orders[cohort][name]))["dealt"]
    for name in federation.names[:5]:
        order = {
            "attempt": {"run": RUN, "batch": 0, "slot": 0, "round": 1},
            "participants": base64.b64encode(to_bits(federation.names[:5], federation.roster)).decode(),
            "dealt": [dealt[other] for other in federation.names[:5]],
        }
        with pytest.raises(ProtocolError, match="'cohort' is not what it must be"):
            federation.sites[name].mask(1, json.dumps(order), CONTEXT, np.zeros(8, np.uint16))


def test_shares_that_were_dealt_with_earlier_keys_are_refused():
    ready = Ready()
    again = ServerBatch(RUN, 0, 3, ready.federation.roster, ready.federation.terms)  # the same number, against the rule
    for name in ready.names:
        again.add_keys(name, ready.federation.answer(name, "keys", again.keys_order()))
    for name, order in again.shares_orders().items():
        again.add_shares(name, ready.federation.answer(name, "shares", order))
    for name in ready.names:
        ready.refuse_mask(name, "dealt of .*: 'keys' is not what it must be")


# Unmasking


def test_the_survivors_and_the_dropped_must_part_the_participants():
    ready = Ready().mask_all()
    for place, name in enumerate(ready.names):
        other = ready.names[place - 1]
        rest = [each for each in ready.names if each != other]
        for survivors, dropped in ((ready.names, [other]), (rest, []), (rest, [other, name])):
            order = json.loads(ready.unmask[name])
            order.update(survivors=bits(ready, survivors), dropped=bits(ready, dropped))
            order["masked"] = [order["masked"][ready.names.index(each)] for each in survivors]
            ready.refuse(name, "unmask", order, "are not, each once, those who were to mask")
        order = json.loads(ready.unmask[name])
        order.update(survivors=bits(ready, set(ready.names) - {name}), dropped=bits(ready, [name]))
        ready.refuse(name, "unmask", order, "this site masked its vector, and is not among the survivors")
    ready.goes_on()


def test_survivors_below_the_threshold_or_the_minimum_are_refused():
    for terms, needed in ((Terms(None, 3, 16, 1.0), 4), (Terms(3, 5, 16, 1.0), 5)):
        ready = Ready(terms=terms).mask_all()
        for name in ready.names:
            others = [other for other in ready.names if other != name]
            survivors = sorted([name, *others[: needed - 2]])
            order = json.loads(ready.unmask[name])
            order.update(survivors=bits(ready, survivors), dropped=bits(ready, others[needed - 2 :]))
            order["masked"] = [order["masked"][ready.names.index(each)] for each in survivors]
            ready.refuse(name, "unmask", order, f"{needed - 1} sites in the neighbourhood of {name}: it takes {needed}")
        ready.goes_on()


def test_a_survivor_needs_its_own_statement_of_this_attempt():
    ready = Ready()
    foreign = ServerRound(ready.batch, 0, 1, CONTEXT, 8, ready.names)
    other_context = Ready()  # the same keys: the same seeds
    for name in ready.names:
        other_context.federation.mask(other_context.opened, name, ready.vectors[name], context=bytes(32))
    strange = [json.loads(view) for view in other_context.federation.view[10::2]]
    ready.mask_all()
    assert foreign.participants == ready.names
    for place, name in enumerate(ready.names):
        other = place - 1
        for statement, match in (
            (strange[other], "'context' is not what it must be"),
            (json.loads(ready.unmask[name])["masked"][place], "signature"),
        ):
            order = json.loads(ready.unmask[name])
            order["masked"][other] = statement
            ready.refuse(name, "unmask", order, match)
        order = json.loads(ready.unmask[name])
        del order["masked"][other]
        ready.refuse(name, "unmask", order, "4 parts for this site's 5 holders")
    ready.goes_on()


@pytest.mark.parametrize("field", ["site", "attempt", "keys", "participants", "context"])
def test_who_signed_that_it_masked_for_something_else_is_no_survivor(field):
    ready = Ready().mask_all()
    lies = {"site": "another", "attempt": Attempt(run=RUN, batch=0, slot=0, round=2)}
    for place, name in enumerate(ready.names):
        unmask = ready.unmask[name]
        order = signed_otherwise(ready, Masked, unmask, "masked", place - 1, field, lies.get(field, bytes(32)))
        ready.refuse(name, "unmask", order, f"masked of {ready.names[place - 1]}: '{field}' is not what it must be")
    ready.goes_on()


def test_survivors_are_held_against_all_holders_of_shares_not_against_those_who_were_to_mask():
    """Three are enough of four, and fewer than the threshold among the five to whom each has dealt."""
    ready = Ready()
    ready.opened = ServerRound(ready.batch, 0, 1, CONTEXT, 8, ready.names[:4])
    for name in ready.names[:4]:
        ready.opened.add(name, *ready.federation.mask(ready.opened, name, ready.vectors[name]))
    orders = ready.opened.unmask_orders()
    for name in ready.names[:3]:
        order = json.loads(orders[name])
        order.update(survivors=bits(ready, ready.names[:3]), dropped=bits(ready, ready.names[3:4]))
        del order["masked"][3]
        ready.refuse(name, "unmask", order, f"3 sites in the neighbourhood of {name}: it takes 4")


def test_shares_in_another_order_or_of_another_slot_or_receiver_are_refused():
    ready = Ready().mask_all()
    for place, name in enumerate(ready.names):
        swapped, other_slot, other_receiver = (json.loads(ready.unmask[name]) for _ in range(3))
        swapped["sealed"][0], swapped["sealed"][1] = swapped["sealed"][1], swapped["sealed"][0]
        dealt = ready.batch.deals[ready.names[2]].slots
        other_slot["sealed"][2] = base64.b64encode(dealt[1].sealed[place]).decode()
        other_receiver["sealed"][2] = base64.b64encode(dealt[0].sealed[place - 1]).decode()
        for order in (swapped, other_slot, other_receiver):
            ready.refuse(name, "unmask", order, "not what .* sealed for")
    ready.goes_on()


def test_a_second_list_is_refused_and_the_first_answered_as_before():
    ready = Ready().mask_all()
    other = ServerRound(ready.batch, 0, 1, CONTEXT, 8, ready.names)
    for statement in range(COUNT - 1):
        name = ready.names[statement]
        other.add(name, ready.opened._masked[name].to_json().decode(), masked_again(ready, name))
    lists = other.unmask_orders()
    for name in ready.names[:-1]:
        answer = ready.federation.answer(name, "unmask", ready.unmask[name])
        ready.refuse(name, "unmask", lists[name], "unmasked for other survivors")
        assert ready.federation.answer(name, "unmask", ready.unmask[name]) == answer
    ready.goes_on()


def masked_again(ready, name):
    return ready.federation.mask(ready.opened, name, ready.vectors[name])[1]


def test_who_has_not_masked_unmasks_nothing_and_who_masked_later_forgot_the_earlier():
    ready = Ready()
    late = ready.names[-1]
    for name in ready.names[:-1]:
        ready.opened.add(name, *ready.federation.mask(ready.opened, name, ready.vectors[name]))
    orders = ready.opened.unmask_orders()
    ready.refuse(late, "unmask", orders[ready.names[0]], "has masked nothing")
    second = ServerRound(ready.batch, 1, 2, CONTEXT, 8, ready.names)
    for name in ready.names:
        ready.federation.mask(second, name, ready.vectors[name], round=2)
        ready.refuse(name, "unmask", orders[ready.names[0]], "'attempt' is not what it must be")


def test_new_keys_end_the_batch_before_but_not_the_memory_of_rounds():
    ready = Ready().mask_all()
    for name in ready.names:
        earlier = ready.federation.sites[name].record["keys"]
        ready.federation.answer(name, "keys", ready.batch.keys_order())
        later = ready.federation.sites[name].record
        assert not set(earlier["mask"] + earlier["seal"]) & set(later["keys"]["mask"] + later["keys"]["seal"])
        ready.refuse(name, "unmask", ready.unmask[name], "ask for shares first")
        ready.refuse_mask(name, "ask for shares first")
    ready = Ready()
    ready.mask_all()
    ready.federation.set_up(number=1)
    again = ServerRound(ready.federation.batch, 0, 1, CONTEXT, 8, ready.names)
    for name in ready.names:
        ready.refuse_mask(name, "round 1: this site masked round 1", order=again.mask_order(name))


@pytest.mark.parametrize("step", ["keys", "shares", "unmask"])
@pytest.mark.parametrize("order", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"a": NaN}', b"{" * 4000, b" " * 10**6])
def test_orders_that_are_no_orders_are_refused(step, order):
    ready = Ready().mask_all()
    ready.refuse(ready.names[0], step, order, "order (for|to)")
    ready.goes_on()


def test_a_site_needs_a_roster_with_its_own_key_and_a_record_of_its_own_run():
    roster, terms = roster_of(["a", "b"]), Terms(None, 2, 16, 1.0)
    with pytest.raises(InputError, match="no site 'c' with this site's own key"):
        SiteProtocol("c", identity("c"), roster, terms, Minimums(minimum_sites=2), RUN)
    with pytest.raises(InputError, match="no site 'a' with this site's own key"):
        SiteProtocol("a", identity("b"), roster, terms, Minimums(minimum_sites=2), RUN)
    record = SiteProtocol("a", identity("a"), roster, terms, Minimums(minimum_sites=2), RUN).record
    with pytest.raises(InputError, match=f"is of run '{RUN}'"):
        SiteProtocol("a", identity("a"), roster, terms, Minimums(minimum_sites=2), "another", record=record)
