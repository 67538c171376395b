"""The rule of the verdicts: its cases, its error rates and its power, on numbers whose truth is known."""
import itertools

import numpy as np
import pytest
from scipy import stats

from sadt_nb.papers.claims import (
    OUTCOMES, discoveries, outcome, outside_regime, paired_by_image, paired_by_seed, power, seeds_for_power,
    smallest_effect, weakest)

STEPS = np.arange(-12, 13) / 10

def cases(mean, low, high, s, p):
    "The table of the rule: one condition per outcome, written without an order."
    inside = -s < low and high < s
    return {
        'absent': inside,
        'opposite': high < 0 and low <= -s,
        'smaller than claimed': low > 0 and s <= high < p,
        'seen': low > 0 and high >= max(s, p) and mean >= s,
        'no power': (low <= 0 <= high and not inside) or (low > 0 and high >= max(s, p) and mean < s)}

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
    ((-.06, -.08, -.04, .2, .3), 'absent'), ((1., .8, 1.2, .5, 1.), 'seen'),
    ((-1., -2, -.5, .5, 1.), 'opposite')])
def test_examples(numbers, expected): assert outcome(*numbers) == expected

def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match='must not fall'): outcome(0, 1, 2, .2)
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
    assert outside_regime(50_000, 20, full) == ['10% of the training images that the paper shows']
