"""The rule of the verdicts: its cases, its error rates and its power, on numbers whose truth is known."""
import base64
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from published_tables import SAM_STUDY_LOGS
from scipy import stats

from sadt_nb.core.display import Card
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.results import unpacked
from sadt_nb.papers import claims as claims_page
from sadt_nb.papers import distill_claims as distill_page
from sadt_nb.papers import networks as networks_page
from sadt_nb.papers import places
from sadt_nb.papers import sadt_claims as sadt_page
from sadt_nb.papers import sam_study_claims as study_page
from sadt_nb.papers import verdict_rows
from sadt_nb.papers.claims import INERT, LOWER, NO_GAIN, NO_LOSS, OUTCOMES, Claim, Evidence, Published
from sadt_nb.papers.claims import Setting, Side, discoveries, image_variance, outcome, outside_regime
from sadt_nb.papers.claims import paired_by_image, paired_by_seed, power, seeds_for_power, smallest_effect
from sadt_nb.papers.claims import weakest, without_chance
from sadt_nb.papers.grids import paper_ensembles, paper_grid
from sadt_nb.papers.networks import BY_IMAGE, Comparisons, finished_runs, judged, stored_networks
from sadt_nb.papers.verdict_rows import claim_row, paper_sentence, price
from sadt_nb.papers.places import PLACES
from sadt_nb.papers.sadt_claims import sadt_claims
from sadt_nb.papers.verdicts import judged_claims

STEPS = np.arange(-12, 13) / 10

def cases(mean, low, high, s, p):
    "The table of the rule: one condition per outcome, written without an order."
    inside = -s < low and high < s
    return {
        'absent': inside,
        'opposite': high < 0 and low <= -s,
        'smaller than claimed': low > 0 and s <= high < p,
        'seen': low > 0 and high >= max(s, p) and mean >= s,
        'claimed size excluded': low <= 0 <= high < p and not inside,
        'no power': (low <= 0 and high >= p and not inside) or (low > 0 and high >= max(s, p) and mean < s)}

@pytest.mark.parametrize('s, p', [(.2, None), (.2, .1), (.2, .4), (.5, 1.)])
def test_the_cases_are_disjoint_and_complete(s, p):
    met = set()
    for low, mean, high in itertools.combinations_with_replacement(STEPS, 3):
        holds = [k for k, v in cases(mean, low, high, s, s if p is None else p).items() if v]
        assert holds == [outcome(mean, low, high, s, p)], (low, mean, high)
        met.update(holds)
    assert met <= OUTCOMES.keys() and {'absent', 'opposite', 'seen', 'no power'} <= met

@pytest.mark.parametrize('numbers, expected', [
    ((7.05, 5.5, 8.6, 5., 10.), 'smaller than claimed'), ((-4, -28.7, 20.7, .5, 1.), 'no power'),
    ((.2, -.3, .9, .5, 1.), 'claimed size excluded'), ((.2, -.3, 1., .5, 1.), 'no power'),
    ((-.06, -.08, -.04, .2, .3), 'absent'), ((1., .8, 1.2, .5, 1.), 'seen'),
    ((-1., -2, -.5, .5, 1.), 'opposite')])
def test_examples(numbers, expected): assert outcome(*numbers) == expected

def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match='must be in ascending order'): outcome(0, 1, 2, .2)
    with pytest.raises(ValueError, match='smallest'): outcome(1, 0, 2, 0)

def test_the_smallest_effect():
    assert smallest_effect(3.) == 1.5 and smallest_effect(.1) == smallest_effect() == .2
    assert np.isclose(np.exp(smallest_effect(1.21, True)), 1.1)
    assert np.isclose(smallest_effect(.5, True), smallest_effect(2., True))
    assert np.isclose(np.exp(smallest_effect(factor=True)), 1.05)

def test_the_weakest_part_decides():
    assert weakest(['seen'] * 15 + ['no power']) == 'no power' and weakest([]) == 'not run'
    assert weakest(['seen', 'outside its regime', 'absent']) == 'absent'

def simulated(rng, effect, n=5, m=400):
    "Right and wrong of two kinds of network, with seeds and images that both vary."
    image = rng.normal(0, 1, m)
    kinds = []
    for shift in (effect, 0):
        own = rng.normal(0, .4, m) # an image may suit one kind of network
        z = .8 + shift + image + own + rng.normal(0, .05, (n, 1)) + rng.normal(0, .4, (n, m))
        kinds.append(z > 0)
    return kinds

def test_error_rate_of_the_interval_with_seeds_and_images():
    rng = np.random.default_rng(0)
    wrong = np.zeros(3)
    for _ in range(1000):
        a, b = simulated(rng, 0)
        of_a, of_b = 100 * a.mean(1), 100 * b.mean(1)
        seeds_only = stats.ttest_rel(of_a, of_b)
        found = paired_by_image(a, b).p, paired_by_seed(of_a, of_b, a.shape[1]).p, seeds_only.pvalue
        wrong += np.array(found) < .05
    by_image, by_seed, seeds_only = wrong / 1000
    assert .02 < by_image < .07
    assert by_seed <= by_image
    assert seeds_only > .1, 'a t-test over seeds leaves out that test images are a sample'

def test_without_image_effects_the_interval_is_near_the_t_test():
    rng = np.random.default_rng(1)
    share = np.clip(.5 + rng.normal(0, .1, (6, 1)), 0, 1)
    a, b = rng.random((6, 2000)) < share, rng.random((6, 2000)) < .5
    e = paired_by_image(a, b)
    d = 100 * (a.mean(1) - b.mean(1))
    assert np.isclose(e.mean, d.mean()) and np.isclose(e.error, stats.sem(d), rtol=.1)

@pytest.mark.parametrize('effect', [.5, 1., 2.])
def test_power_as_stated(effect):
    rng = np.random.default_rng(2)
    d = rng.normal(effect, 1, (20_000, 5))
    t = d.mean(1) / (d.std(1, ddof=1) / 5**.5)
    assert abs((t > stats.t.ppf(.975, 4)).mean() - power(1 / 5**.5, 4, effect)) < .012

def test_power_of_a_ratio_of_spreads_as_stated():
    "One kind varies less by a factor; the F-test over six seeds finds it as often as stated."
    rng = np.random.default_rng(4)
    for factor in (1., 1.5, 3.):
        sd = rng.normal(0, [1, factor], (20_000, 6, 2)).std(1, ddof=1)
        share = (sd[:, 0]**2 / sd[:, 1]**2 < stats.f.ppf(.025, 5, 5)).mean()
        assert abs(share - claims_page.spread_power(5, np.log(factor))) < .012
    few = claims_page.seeds_for_spread(np.log(1.05))
    assert 3200 < few < 3400 # by hand: (1.96 + .84)^2 / log(1.05)^2 = 3,297 degrees of freedom
    assert claims_page.seeds_for_spread(np.log(1.05), groups=3) == pytest.approx(few / 3, abs=1)

def test_the_stated_power_is_an_estimate():
    """It takes the spread over seeds that was seen for the true one.

    With three seeds it varies widely around the true power, and its mean is not far from it."""
    rng = np.random.default_rng(5)
    stated = [judged('', '', pd.Series(rng.normal(.5, .4, 3))).power for _ in range(500)]
    true = power(.4 / 3**.5, 2, .2)
    assert abs(np.mean(stated) - true) < .15
    assert np.quantile(stated, .9) > 2 * np.quantile(stated, .1)

def test_seeds_for_power():
    assert seeds_for_power(1., 1.) == 10 # from tables of the paired t-test: 10 pairs for an effect of one
    assert seeds_for_power(1., .5) == 34

def test_false_discoveries():
    assert discoveries([.01, .02, .03, .9]).tolist() == [True, True, True, False]
    assert discoveries([.04, .9, .9, .9]).sum() == 0 and len(discoveries([])) == 0
    rng = np.random.default_rng(3)
    z = rng.normal(0, 1, (2000, 50))
    z[:, :10] += 3
    found = np.array([discoveries(row) for row in 2 * stats.norm.sf(abs(z))])
    false = found[:, 10:].sum(1) / np.maximum(found.sum(1), 1)
    assert .03 < false.mean() < .05 # the procedure holds 40/50 of .05

def test_the_regime():
    full = 50_000, 200
    assert outside_regime(50_000, 200, full, 94) == [] and outside_regime(50_000, 21, full) == []
    assert len(outside_regime(10_000, 16, full, 11, term=.001)) == 3
    assert outside_regime(50_000, 20, full) == ["10% of the size of the paper's training"]


# From evidence to the outcome of a claim


def evidence(mean, low, high, n=3, **facts): return Evidence('here', '', mean, low, high, n, **facts)
def claim(*ours, **facts): return Claim('', '', '', '', list(ours), **facts)

@pytest.mark.parametrize('side, numbers, expected', [
    (LOWER, (.5, .4, .6), 'seen'), (LOWER, (2., 1.8, 2.2), 'opposite'), (LOWER, (1., .97, 1.03), 'absent'),
    (NO_LOSS, (-.1, -.6, .4), 'seen'), (NO_LOSS, (-2., -2.5, -1.5), 'opposite'),
    (NO_LOSS, (-1., -1.1, -.9), 'absent'), (Side(.8, factor=True), (.9, .7, 1.2), 'no power')])
def test_every_side_of_a_border(side, numbers, expected):
    assert evidence(*numbers, side=side).outcome == expected

def test_a_published_ratio_gives_the_smallest_effect():
    e = evidence(.5, .45, .55, side=LOWER, published=Published(.25))
    assert e.claimed == pytest.approx(np.log(4)) and e.smallest == pytest.approx(np.log(2))
    assert e.outcome == 'smaller than claimed'
    against = evidence(.5, .45, .55, side=LOWER, published=Published(1.5))
    assert against.claimed is None and against.smallest == pytest.approx(np.log(1.05))

def test_one_of_sixteen_parts_decides():
    good = [evidence(1, .8, 1.2, part=str(i)) for i in range(15)]
    assert claim(*good).outcome == 'seen'
    assert claim(*good, evidence(.1, -1, 1.2, part='15')).outcome == 'no power'
    few = evidence(1, np.nan, np.nan, n=1, part='0')
    assert claim(*good, few).outcome == 'seen', 'one seed decides nothing beside three'
    assert claim(few).outcome == 'no power'
    outside = evidence(1, .8, 1.2, part='15', outside=('near chance',))
    assert claim(*good, outside).outcome == 'outside its regime'
    beside = outside._replace(part=None)
    assert claim(*good, beside).outcome == 'seen' and claim(beside).outcome == 'not run'
    assert claim(*good, control=[evidence(-1, -1.2, -.8)]).outcome == 'opposite'

def networks(rng, effects, n=4, images=600, **facts):
    "Networks of several kinds whose accuracies differ by known effects, as a table with the bits."
    hard = rng.normal(0, 1, images)
    rows = []
    for kind, effect in effects.items():
        for seed in range(n):
            bits = hard + rng.normal(0, .3, images) < .5 + effect
            rows.append(dict(place='p', kind=kind, seed=seed, accuracy=100 * bits.mean(), right=bits,
                             test_images=images, images=1000, epochs=20, **facts))
    return pd.DataFrame(rows)

def test_bits_are_paired_by_image_and_missing_bits_widen_the_interval():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.))
    e = Comparisons(table).gap('p', '', 'a', 'b')
    a, b = (np.stack(list(table[table.kind == k].right)) for k in 'ab')
    by_hand = paired_by_image(a, b)
    assert (e.mean, e.low, e.high) == pytest.approx(by_hand[:3]) and 'by image' in e.pairing
    table.loc[0, 'right'] = None
    without = Comparisons(table).gap('p', '', 'a', 'b')
    assert without.low < e.low < e.high < without.high and 'widest' in without.pairing
    assert without.mean == pytest.approx(e.mean)

def test_without_the_number_of_test_images_the_interval_holds_for_seeds():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.)).drop(columns='right')
    e = Comparisons(table.assign(test_images=np.nan)).gap('p', '', 'a', 'b')
    a, b = (table[table.kind == k].accuracy.to_numpy() for k in 'ab')
    low, high = stats.ttest_rel(a, b).confidence_interval(.95)
    assert (e.low, e.high, e.pairing) == (pytest.approx(low), pytest.approx(high), 'new seeds')

def test_stored_runs_that_lie_outside_the_regime_are_shown():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.))
    def found(**facts): return Comparisons(table.assign(**facts)).gap('p', '', 'a', 'b', of_paper=(1000, 20))
    assert found().outside == () and found().share == 1
    assert found(epochs=2).outcome == 'outside its regime'
    assert found(accuracy=11.).outside == ('the network is near chance',)
    assert found(term=.001).outside == ('the loss term is inert',)

def test_chance_on_a_page():
    """With no effect in 400 comparisons, about twenty intervals leave out zero, and no claim may be seen.

    A true effect among them stays."""
    rng = np.random.default_rng(1)
    none = [claim(judged('', '', pd.Series(rng.normal(0, 1, 5)))) for _ in range(400)]
    true = claim(judged('', '', pd.Series([5., 5.1, 5.2, 4.9, 4.8])))
    effects = 'seen', 'opposite', 'smaller than claimed'
    assert sum(c.outcome in effects for c in none) > 8
    guarded = without_chance(dict(page=[*none, true]))['page']
    assert sum(c.outcome in effects for c in guarded[:-1]) <= 1 and guarded[-1].outcome == 'seen'

@pytest.fixture(scope='module')
def claims(): return judged_claims()

def test_every_claim_of_the_page(claims):
    "Its outcome, its method, its published effects; a claim without runs says what it needs."
    every = [c for of_paper in claims.values() for c in of_paper]
    assert len({c.says for c in every}) == len(every)
    for c in every:
        assert c.outcome in OUTCOMES and c.method and c.short and c.where
        if c.outcome == 'not run': assert c.note
    assert sum(any(e.published for e in (*c.ours, *c.own)) for c in every) > 25
    assert 'differ by less than a point' not in ' '.join(c.says for c in every), 'no paper claims this'

def test_costs_on_a_cpu_and_formulas_are_not_judged_by_runs(claims):
    of_saf = {c.short: c for c in claims['SAF and MESA']}
    cost = of_saf['cost of a step of MESA']
    assert cost.by_runs == 'outside its regime' and 'measured on a CPU' in cost.ours[0].outside[0]
    memory = of_saf['memory of SAF (a formula)']
    assert memory.by_own == 'seen' and all(e.exact for e in memory.own) and not memory.ours

def test_what_the_authors_print_decides(claims):
    of_sadt = {c.short: c for c in claims['SADT']}
    steps = of_sadt["a step costs a plain step's time"]
    assert steps.by_own == 'opposite'
    assert [e.mean for e in steps.own] == pytest.approx([6.64 / 1.94, 8.76 / 1.94, 4.87 / 1.94])
    winner = of_sadt['no variant is a clear winner']
    assert winner.by_own == 'seen' and winner.own[0].mean == 9 / 12 and 'In seven of twelve' in winner.note

def test_printed_speeds_decide_the_claims_on_costs(claims):
    "The times of a step as the paper prints them, typed a second time: plain or SAM divided by the method."
    of_saf = {c.method: c for c in claims['SAF and MESA'] if c.short.startswith('cost')}
    expected = dict(
        SAM=[1627 / 802, 1042 / 518, 703 / 351, 5154 / 2566, 3289 / 1657, 3314 / 1690, 501 / 246, 501 / 249,
             732 / 367, 739 / 370, 394 / 194, 401 / 198],
        SAF=[1627 / 1612, 1042 / 1031, 3289 / 3213, 3314 / 3248, 501 / 497, 501 / 497, 732 / 727, 739 / 729,
             394 / 391, 401 / 397],
        MESA=[1627 / 1386, 1042 / 888, 3289 / 2780, 3314 / 2793, 501 / 425, 501 / 426, 732 / 617, 739 / 625,
              394 / 332, 401 / 339],
        LookSAM=[2566 / 4273], ESAM=[802 / 1037, 518 / 650])
    for method, ratios in expected.items():
        claim = of_saf[method]
        assert [e.mean for e in claim.own] == pytest.approx(ratios), method
        assert claim.outcome == "decided by the authors' own numbers"
    outcomes = {method: of_saf[method].by_own for method in expected}
    assert outcomes == dict(SAM='seen', SAF='opposite', MESA='opposite', LookSAM='seen', ESAM='seen')
    assert of_saf['SAF'].note == "The paper's tables have 0.7 to 2.4% more time."
    assert of_saf['MESA'].note.startswith("The paper's tables have 17.3 to 18.7% more time.")

def test_a_printed_ratio_may_miss_the_claimed_one_by_its_rounding():
    side = places.at_most_printed(1.15, 2)
    assert side.effect(1.1549) > 0 > side.effect(1.1551)

def test_published_effects_of_the_notebook(claims):
    "From the notebook's printed accuracies: 55.8, 56.9 and 56.6 against 45.7."
    notebook, = [c for c in claims['SADT'] if 'released notebook' in c.short]
    judged_ones = [e for e in notebook.ours if not e.outside]
    assert [e.published.effect for e in judged_ones] == pytest.approx([10.1, 11.2, 10.9])
    assert all(e.re_estimated for e in judged_ones), 'both readings of BatchNorm are shown'

def test_every_comparison_of_accuracies_has_both_readings(claims):
    "Of our own networks; the authors' logs and ensembles have one reading."
    missing = []
    for of_paper in claims.values():
        for c in of_paper:
            if 'ensemble' in c.short or 'points' not in c.says or 'raining accuracy' in c.says: continue
            missing += [(c.short, e.label) for e in (*c.ours, *c.control) if e.n and not e.re_estimated]
    assert not missing

def test_a_row_states_the_training_of_both_sides():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.)).assign(term=.004)
    stated = Published(1., accuracy=93.2)
    e = Comparisons(table).gap('p', '', 'a', 'b', published=stated, of_paper=(2000, 40))
    accuracy = f'{table.accuracy.mean():.1f}'
    assert e.setting[1:3] == (1000, 20) and e.setting[4:7] == (2000, 40, 93.2)
    text = claim_row(claim(e), 'SADT', {}, {})
    assert f'ours: 1,000 images, 20 epochs, accuracy {accuracy}%' in text
    assert "gradient of the term at most 0.004 of the loss's" in text
    assert 'paper: 2,000 images, 40 epochs, accuracy 93.2%' in text

def test_the_regime_knows_the_number_of_classes():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.)).assign(accuracy=5.)
    def found(**facts): return Comparisons(table.assign(**facts)).gap('p', '', 'a', 'b', of_paper=(1000, 20))
    assert found(classes=10).outside == ('the network is near chance',)
    assert found(classes=100).outside == ()

def test_a_teacher_is_compared_in_both_readings():
    table = networks(np.random.default_rng(0), dict(a=.3)).drop(columns='right')
    table = table.assign(accuracy=[70., 71., 72., 73.], accuracy_bn=[75., 76., 77., 78.],
                         teacher_accuracy=69., teacher_accuracy_bn=73.)
    e = Comparisons(table).gap('p', '', 'a')
    assert e.mean == pytest.approx(2.5) and e.re_estimated[0] == pytest.approx(3.5)

def test_a_student_and_its_teacher_are_paired_by_image():
    "By hand: the bits of each student against those of the teacher with the next seed."
    table = networks(np.random.default_rng(0), dict(student=.3, teacher=0.))
    student, teacher = (np.stack(list(table[table.kind == k].right)) for k in ('student', 'teacher'))
    teacher = np.roll(teacher, -1, 0)
    of_students = table[table.kind == 'student'].assign(
        teacher_accuracy=100 * teacher.mean(1), teacher_right=list(teacher))
    e = Comparisons(of_students).gap('p', '', 'student')
    assert (e.mean, e.low, e.high) == pytest.approx(paired_by_image(student, teacher)[:3])
    assert e.pairing == BY_IMAGE
    without = Comparisons(of_students.drop(columns='teacher_right')).gap('p', '', 'student')
    assert without.mean == pytest.approx(e.mean) and 'widest' in without.pairing

def test_ensembles_that_store_their_right_images_are_paired_by_image(monkeypatch):
    "The bits of two kinds of ensembles, from a generator; those of a third kind are of an earlier version."
    stored, rng, right = networks_page.run_ensemble, np.random.default_rng(0), {}
    labels = {e.members: e.label for e in paper_ensembles('distill/cifar_small')}
    def found(members, root):
        result, label = stored(members, root), labels[members]
        if '2 members' not in label and 'rounds 0 to 1' not in label: return result
        right[label] = hits = rng.random(10_000) < .7
        packed = base64.b64encode(np.packbits(hits).tobytes()).decode()
        return result | dict(accuracy=hits.mean(), right=packed, data_facts=dict(test=10_000, classes=10))
    monkeypatch.setattr(networks_page, 'run_ensemble', found)
    place, = [p for p in PLACES if p.preset == 'distill/cifar_small']
    nets = Comparisons(stored_networks([place]))
    kinds = 'independent, 2 members', 'alpha 0.5, rounds 0 to 1'
    e = nets.gap(place.name, '', *kinds)
    earlier = nets.gap(place.name, '', 'independent, 3 members', 'alpha 0.5, rounds 0 to 2')
    bits = [np.stack([right[f'{kind} · seed {s}'] for s in (0, 10, 20)]) for kind in kinds]
    by_hand = paired_by_image(*bits)
    assert (e.mean, e.low, e.high) == pytest.approx(by_hand[:3])
    assert e.pairing == BY_IMAGE and 'widest' in earlier.pairing

def test_wrong_labels_are_outside_unless_the_paper_has_them():
    table = networks(np.random.default_rng(0), dict(a=.3, b=0.)).assign(place='p, 40% wrong labels')
    def found(**facts):
        return Comparisons(table).gap('p, 40% wrong labels', '', 'a', 'b', of_paper=(1000, 20), **facts)
    assert found().outside == ('the paper trains on right labels',)
    assert found(wrong_labels=True).outside == ()


def test_two_leads_on_the_same_test_images_may_move_in_opposite_directions():
    "At 50% each lead can have a standard deviation of 1 point over sets of 10,000 images, so theirs is 2."
    kinds = [f'{m} · batch {bs}' for m in ('SAM', 'SGD') for bs in (128, 32)]
    rows = []
    for kind, i in itertools.product(kinds, range(3)):
        accuracy = 50 + 1e-6 * i * (kind == kinds[0])
        rows.append(dict(place=places.CONSTANT_RATE, kind=kind, seed=f'seed {i}', accuracy=accuracy,
                         accuracy_bn=50.))
    e, = study_page._larger_lead(Comparisons(pd.DataFrame(rows)))
    assert e.high - e.low == pytest.approx(2 * 1.959964 * 2, rel=1e-5)


# The runs with a strong recipe: half the channels or all of them, eight epochs of all images


def stored_bits(place, kind):
    "Right test images of each seed, read from the file without the table of networks."
    preset, folder = dict(right=('fast/narrow', 'fast_narrow'), wrong=('fast/narrow_noise40', 'fast_narrow'),
                          tuned=('fast/narrow_rates', 'fast_narrow'))[place]
    rows = finished_runs(folder)
    runs = {c.label: c.run for c in paper_grid(preset)}
    return np.stack([unpacked(rows[runs[f'{kind} · seed {s}']]['right'], 10_000) for s in range(3)])

def strong(claims, paper, short, label, place=places.STRONG):
    "One comparison of a claim, of our runs or of its control."
    c = next(c for c in claims[paper] if c.short == short)
    found, = [e for e in (*c.ours, *c.control) if (e.place, e.label) == (place, label)]
    return found

SAF, SADT, DISTILL = 'SAF and MESA', 'SADT', 'Self-distillation'
OF_RECIPE = [ # paper, claim, comparison, the two kinds
    (SAF, 'SAM above plain training', 'SAM', 'sam', 'baseline'),
    (SAF, 'SAF above plain training', 'SAF, with tau squared', 'saf, scaled', 'baseline'),
    (SAF, 'MESA above plain training', 'MESA, with tau squared', 'mesa, scaled', 'baseline'),
    (SAF, 'SAF as good as SAM', 'SAF, with tau squared', 'saf, scaled', 'sam'),
    (SAF, 'MESA as good as SAM', 'MESA, with tau squared', 'mesa, scaled', 'sam'),
    (SADT, 'SADT above plain training', 'SADT-1', 'sadt1', 'baseline'),
    (SADT, 'SADT above plain training', 'SADT-1 against two steps per batch', 'sadt1', 'repeat_step'),
    (SADT, 'SADT above plain training', 'SADT-1 against a weight average', 'sadt1', 'weight_average'),
    (SADT, 'SADT above plain, equal time', 'SADT-1 against plain training of as many passes', 'sadt1',
     'baseline, twice the passes'),
    (SADT, 'SADT above plain, equal time', 'SADT-1 against a weight average of as many passes', 'sadt1',
     'weight_average, twice the passes'),
    (SADT, 'SADT above GC, AGC and SAM', 'SADT-1 against SAM', 'sadt1', 'sam'),
    (DISTILL, 'SAM above the student', 'alpha 0.5', 'sam', 'distillation')]

@pytest.mark.parametrize('paper, short, label, a, b', OF_RECIPE)
def test_the_strong_recipe_is_compared_by_image_and_not_judged(claims, paper, short, label, a, b):
    e = strong(claims, paper, short, label)
    by_hand = paired_by_image(stored_bits('right', a), stored_bits('right', b))
    assert (e.mean, e.low, e.high) == pytest.approx(by_hand[:3]) and e.pairing == BY_IMAGE
    length = {SAF: 200, SADT: 200, DISTILL: 600}[paper]
    if 'equal time' in short: length = 370 / 2 # the longer of the two trainings has 16 epochs
    assert e.share == pytest.approx(8 / length, rel=.02) and e.outcome == 'outside its regime'

@pytest.mark.parametrize('label, a, b', [('SAM against SGD', 'sam', 'baseline, twice the passes')])
def test_at_equal_passes_the_strong_recipe_has_a_sixth_of_the_study_and_is_judged(claims, label, a, b):
    "16 epochs against 100 epochs, both of 50,000 images: inside the regime, so the rule decides."
    e = strong(claims, 'SAM and ASAM study', 'SAM above SGD, equal passes', label)
    by_hand = paired_by_image(stored_bits('right', a), stored_bits('right', b))
    assert (e.mean, e.low, e.high) == pytest.approx(by_hand[:3])
    assert e.share == pytest.approx(16 / 100) and e.outside == ()
    assert e.outcome == outcome(e.mean, e.low, e.high, e.smallest, e.claimed)

@pytest.mark.parametrize('table, words, epochs', [
    ('sadt/notebook20', (), 20), ('sadt/table1', ('cifar10', 'simple_cnn', '512'), 200),
    ('sam_study/a', (), 100), ('sam_study/c', (), 200),
    ('saf/table3', ('cifar10',), 200), ('distill/table2', (), 600)])
def test_the_papers_train_on_all_images_although_some_presets_hold_out_a_hundredth(table, words, epochs):
    assert places.paper_size(table, *words) == (50_000, epochs)

def test_rows_with_tau_squared_are_trained_with_it_and_the_others_without():
    found = places.all_networks()
    factor = found.run.map(lambda r: dict(r.method_args).get('tau_squared', False) if r == r else None)
    of_term = found.run.map(lambda r: getattr(r, 'method', '') in ('saf', 'mesa'))
    named = found.kind.str.endswith(', scaled')
    assert named.sum() == 12 and (factor[of_term] == named[of_term]).all()
    assert found.term[named].between(.05, .3).all(), 'every such run stores its largest gradient ratio'

def test_sam_with_wrong_labels_beside_its_own_table():
    "Table 4, typed a second time, and our difference from the stored bits."
    gains = {noise: sam - sgd for noise, (sgd, sam) in study_page.SAM_TABLE4.items()}
    assert gains == pytest.approx({20: 10.3, 40: 24.6, 60: 42.3, 80: 51.7})
    found = study_page.sam_with_wrong_labels(Comparisons(places.all_networks()))
    for at, plain in (('equal epochs', 'baseline'), ('equal passes', 'baseline, twice the passes')):
        by_hand = paired_by_image(stored_bits('wrong', 'sam'), stored_bits('wrong', plain))
        assert (found[at].mean, found[at].low, found[at].high) == pytest.approx(by_hand[:3])
        assert len(found[at].outside) == 1 and "of the size of the paper's training" in found[at].outside[0]
    assert found['equal epochs'].published.effect == pytest.approx(24.6)


# Stored runs that come later, prices, and rows


def test_runs_of_one_factor_are_taken_up_when_they_are_stored(monkeypatch):
    "The networks are copies of a stored one with known accuracies: SADT-1 leads by nine points."
    cells = paper_grid('sadt/notebook20_factors')
    _, row = next(iter(finished_runs('notebook20').items()))
    def stored(folder):
        if folder != 'notebook20_factors': return {}
        def result(c):
            accuracy = .5 + .09 * c.label.startswith('SADT-1') + .001 * c.run.seed
            return {**row, 'run': c.run, c.result: accuracy, 'accuracy_bn': accuracy}
        return {c.run: result(c) for c in cells}
    monkeypatch.setattr(networks_page, 'finished_runs', stored)
    networks = stored_networks([p for p in PLACES if p.preset.startswith('sadt/notebook20')])
    notebook = next(c for c in sadt_claims(Comparisons(networks)) if 'released notebook' in c.short)
    found = {e.label: e for e in notebook.ours if 'one factor' in e.place and e.n}
    factors = {c.label.split(' · ')[1] for c in cells} - {'as in sadt/notebook20'}
    assert found.keys() == {f'SADT-1, {factor}' for factor in factors}
    for e in found.values():
        assert e.n == 3 and e.mean == pytest.approx(9)
        assert e.part is None and 'one factor' in e.outside[-1], 'shown, and no part of the claim'

def open_claim(spread, smallest, tables=(('sadt/notebook20', ''),)):
    e = evidence(.1, -9, 9, spread=spread, published=Published(2 * smallest))
    return claim(e, tables=tables)

def test_a_price_grows_with_the_seeds():
    speed = {('', False): 1e11, ('', True): 1e13}
    one, two = price(open_claim(1., 1.), speed), price(open_claim(2., 1.), speed)
    assert (one.seeds, two.seeds) == (seeds_for_power(1., 1.), seeds_for_power(2., 1.))
    assert two.hours / one.hours == pytest.approx(two.seeds / one.seeds)
    runs = [c.run for c in paper_grid('sadt/notebook20')] # three seeds of every row
    operations = sum(run_cost(r).flops for r in runs) / 3
    assert one.hours == pytest.approx(one.seeds * operations / 1e11 / 2 / 3600)
    assert one.minutes == pytest.approx(one.seeds * operations / 1e13 / 60)
    unknown = price(claim(tables=(('sadt/notebook20', ''),)), speed)
    assert unknown.seeds == 3 and np.isnan(unknown.effect) and np.isnan(unknown.spread)

def test_the_open_comparison_sets_the_price():
    "The control without power, not the comparison as stated."
    speed = {('', False): 1e11, ('', True): 1e13}
    good = evidence(10, 9, 11, spread=1., published=Published(10.))
    control = evidence(.1, -9, 9, spread=1.)
    tables = (('sadt/notebook20', ''),)
    assert price(claim(good, control=[control], tables=tables), speed).seeds == seeds_for_power(1., .2)

def short_run(place, spread, accuracy, data='cifar10', **facts):
    "Evidence outside the regime, from networks with a known accuracy."
    setting = Setting('a network', 10_000, 15, accuracy, 50_000, 200, data=data)
    stated = Published(2.)
    facts = dict(outside=('short',), published=stated, spread=spread, setting=setting) | facts
    return Evidence(place, '', 1, 0, 2, 3, **facts)

def test_the_most_accurate_networks_set_the_price_outside_the_regime():
    """A weak network of a longer training does not count, and no network of another data set.

    Every part has its own most accurate networks, and the part that needs most seeds gives the price."""
    speed = {('', False): 1e11, ('', True): 1e13}
    weak = short_run('weak', 3.7, 29., share=.09)
    strong = short_run('strong', .8, 87., share=.04)
    digits = short_run('digits', .1, 99., 'digits', share=.001)
    wrong = short_run('wrong labels', .1, 88., 'noisy_cifar10', share=.04)
    def priced(*ours, **facts): return price(claim(*ours, tables=(('sadt/notebook20', ''),), **facts), speed)
    found = priced(weak, digits, strong, wrong)
    assert (found.spread, found.seeds) == (.8, seeds_for_power(.8, 1.))
    assert found.source == 'strong (87%)'
    second = short_run('other', 2.5, 69., part='second')
    assert priced(weak, strong, second, short_run('weak', 9., 29., part='second')).spread == 2.5
    assert priced(weak, strong, control=[short_run('strong', 1.5, 85.)]).spread == 1.5
    assert priced(digits).spread == .1, 'without runs on the data of the table, other data count'
    shown = short_run('strong', 9., 90., part=None)
    assert priced(strong, shown).spread == .8, 'what is no part of the claim has no price'
    inert = short_run('strong', 9., 90., outside=('short', INERT))
    assert priced(inert, strong).spread == .8, 'a term that hardly acts says nothing about the method'
    assert priced(inert).spread == 9., 'without another comparison'
    decided = evidence(1, .8, 1.2, spread=4., published=Published(2.))
    assert priced(strong, decided._replace(part='second')).spread == .8, 'a decided part is not open'

def test_a_row_says_where_the_spread_was_seen_and_how_many_seeds_its_command_trains():
    c = claim(short_run('strong', .8, 87.), tables=(('sadt/table1', 'baseline cifar10 simple_cnn'),
                                                    ('sadt/notebook20', '')))
    found = price(c, {('', False): 1e11, ('', True): 1e13})
    text = claim_row(c, 'SADT', {}, {c.says: found})
    assert f'about {found.seeds:,} seeds, by the spread of 0.80 in strong (87%):' in text
    assert '`sadt_grid sadt/table1 --only "baseline cifar10 simple_cnn"` (1 seed), ' in text
    assert '`sadt_grid sadt/notebook20` (3 seeds). A decision' in text
    table = verdict_rows.price_table(dict(SADT=[c]), {c.says: found})
    assert dict(zip(*table.rows))['seen in'] == 'strong (87%)'

def test_a_ratio_of_spreads_has_a_price():
    "Its seeds come from the F-test: it has no spread of differences."
    speed = {('', False): 1e11, ('', True): 1e13}
    e = Evidence('here', '', .7, .2, 2.4, 3, LOWER, df=4, groups=2)
    p = price(claim(e, tables=(('sadt/notebook20', ''),)), speed)
    assert p.seeds == e.seeds == claims_page.seeds_for_spread(np.log(1.05), groups=2)
    assert p.factor and p.effect == pytest.approx(1.05) and np.isnan(p.spread)

def test_a_folded_table_holds_the_table():
    card = Card([['a', 'b'], ['1', '2']])
    folded = verdict_rows.Folded(card, 'A line')
    opened = folded._repr_markdown_()
    assert opened.startswith('<details><summary>A line</summary>\n\n') and opened.endswith('\n\n</details>')
    assert card._repr_markdown_() in opened and repr(folded) == repr(card)

def test_a_row_opens_to_everything():
    e = evidence(1.25, .8, 1.7, published=Published(1.5, .3, 3), re_estimated=(1.1, .6, 1.6))
    shown = evidence(9, 8, 10, outside=('near chance',))
    c = claim(e, shown, note='A note.', tables=(('sadt/table1', 'sam cifar10'),))
    text = claim_row(c, 'SADT', dict(here='flatness'), {}).replace('\N{NO-BREAK SPACE}', ' ')
    assert text.startswith('<details class="claim" data-paper="SADT" data-outcome="seen"')
    assert text.rstrip().endswith('</details>') and 'A note.' in text
    assert '+1.25 [+0.80, +1.70] (published +1.50 ± 0.30, 3 seeds; BatchNorm re-estimated +1.10' in text
    assert '[here](flatness.ipynb) (3 seeds; not judged: near chance)' in text
    assert '`sadt_grid sadt/table1 --only "sam cifar10"`' in text

def test_a_sentence_counts_every_claim(claims):
    for of_paper in claims.values():
        numbers = re.findall(r'(?:, |and )?(\d+) (?:is|are|has|have)\b', str(paper_sentence(of_paper)))
        assert sum(map(int, numbers)) == len(of_paper)


def test_sides_of_a_border():
    assert (Side(2.).effect(5.), Side(2., above=False).effect(5.), NO_GAIN.effect(.25)) == (3, -3, .75)
    assert places.at_most(2.).effect(2.1) == pytest.approx(0)
    assert places.at_most(2.).effect(1.) == pytest.approx(np.log(2.1))


def test_the_images_on_which_two_networks_may_differ():
    "With errors of 5% and 3%, both networks are wrong on other images: 8% differ, by one point of 100 each."
    assert image_variance(95, 97, 1000) == pytest.approx((.08 * 100**2 - 2**2) / 1000)
    assert image_variance(5, 3, 1000) == pytest.approx((.08 * 100**2 - 2**2) / 1000)


def test_the_sizes_of_the_logs_are_those_of_figure_1():
    assert set(study_page._LOGGED_SIZES) == {int(row[1]) for row in SAM_STUDY_LOGS if row[1] != '-'}


def test_only_open_claims_that_a_table_decides_have_a_price(monkeypatch):
    monkeypatch.setattr(verdict_rows, 'speeds', lambda: None)
    monkeypatch.setattr(verdict_rows, 'price', lambda claim, speed: claim.says.upper())
    def claim(says, outcome, tables): return SimpleNamespace(says=says, outcome=outcome, tables=tables)
    table = (('sadt/table1', ''),)
    of_paper = [claim('a', 'not run', table), claim('b', 'not run', ()), claim('c', 'holds', table)]
    assert verdict_rows.prices(dict(paper=of_paper)) == dict(a='A')


def test_which_rounds_are_compared_when_students_approach_their_teachers():
    seen = []
    def gap(place, what, a, b, **facts):
        seen.append((what, a, b))
        return Evidence('', what, 1., 1., 1., 1, Side(1))
    distill_page._rounds_approach(SimpleNamespace(gap=gap))
    assert seen[0] == ('alpha 0.5', 'alpha 0.5, round 2', 'alpha 0.5, round 1')
    for what, *rounds in seen[1:]: assert rounds == [f'{what}, round 3', f'{what}, round 1']


def test_the_note_of_other_data_names_the_presets():
    assert '`sadt_grid sadt/table1_code` trains Table 1 as released' in sadt_page._other_data().note
