from secateurs.matrix import lab


def test_magnitude_is_the_textbook_s_to_the_fourth_decimal():
    rows = lab.magnitude()
    assert [f"{r.error:.4f}" for r in rows] == ["0.0921", "0.2686", "0.5270", "0.7475", "0.3648"]
    assert [f"{r.threshold_error:.4f}" for r in rows[:4]] == [f"{r.textbook:.4f}" for r in rows[:4]]
    assert [r.threshold_zeros - r.zeros for r in rows[:4]] == [1, 1, 1, 1]


def test_iterative_wins_where_inputs_are_correlated_and_only_there():
    rows = {(r.inputs, r.way): r for r in lab.iterative(2)}
    one, refit, two = (rows["isotropic", w] for w in ("one-shot", "one-shot + refit", "2 rounds with refit"))
    # the textbook's own exercise
    assert [f"{r.calibration:.4f}" for r in (one, refit, two)] == ["0.5270", "0.5229", "0.5210"]
    assert one.held_out < refit.held_out < two.held_out
    one, refit, two = (rows["correlated", w] for w in ("one-shot", "one-shot + refit", "2 rounds with refit"))
    assert one.held_out > refit.held_out > two.held_out
