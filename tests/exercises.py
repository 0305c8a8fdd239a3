"""Your answers to the exercises of tests/README.md. Each function says what it should return.

Replace `raise NotImplementedError` and run the exercise's check, for example

    python -m pytest -q tests/test_exercises.py -k linf

An exercise that is not attempted yet is skipped. Exercises 1, 3 and 10 are not here: they are gaps
in mine.py, which `python tests/blank.py` makes. Gradients, eps and w are lists of tensors, rho a
number; a `loss` is a function from a batch to a scalar that depends on w, as in 04_panacea.py.
"""


def per_tensor_perturbation(grad_h, rho):
    """2. Eq. 2 with one norm PER TENSOR: each tensor of eps gets the norm rho / sqrt(n tensors).

    Returns:
        eps, a list of new tensors shaped like grad_h, with a norm of rho over all of them.
    """
    raise NotImplementedError


def random_perturbation(grad_h, rho, generator):
    """4. A Gaussian direction shaped like grad_h, scaled to one L2 norm of rho over all tensors.

    Args:
        generator: torch.Generator (on the CPU) to draw from.
    Returns:
        eps, a list of new tensors shaped like grad_h.
    """
    raise NotImplementedError


def linf_perturbation(grad_h, rho):
    """5. The eps that raises the linearised h most while every |entry of eps| <= rho.

    Returns:
        eps, a list of new tensors shaped like grad_h.
    """
    raise NotImplementedError


def multi_step_perturbation(loss, w, harmful, rho, steps):
    """6. `steps` steps of projected ascent on h inside ||eps|| <= rho, one gradient for each step;
    w is given back unchanged.

    Args:
        loss: loss(harmful) is h at w. w: list of tensors that require grad.
    Returns:
        eps, a list of new tensors shaped like w.
    """
    raise NotImplementedError


def anchored_direction(grad_h, grad_a, rho, mu):
    """7. One step of length rho that climbs h and descends mu * a, a the loss on refusals.

    Returns:
        eps, a list of new tensors shaped like grad_h.
    """
    raise NotImplementedError


def safe_lora(delta, aligned, unaligned, tau):
    """8. Safe LoRA (arXiv 2405.16833): what a fine-tuned layer's update keeps.

    delta is the layer's update (alpha / r) B A; V = aligned - unaligned weights, all (out, in).
    With C = V V^T / ||V||_F return C @ delta where the cosine similarity of C @ delta and delta
    (as flat vectors) is below tau, else delta itself.
    """
    raise NotImplementedError


# 9. The silent bug. `python tests/silent_bug.py` trains a small model with Panacea and prints its
# log. One of these is wrong with it; write its letter here:
#   "A" the sign of lam is flipped             "B" w is not restored after h(w + eps)
#   "C" eps is normalised tensor by tensor     "D" h(w + eps) is taken on another harmful batch
SILENT_BUG = None

# 11. The border. Your own run folders (none of .results), one per attack strength, in which you
# looked for it, as in ["runs/lr3e-4", "runs/lr1.2e-3"]; and what the refusals turn into beyond it:
# the outcome of the row `panacea` (scale 1) that grows most there: "harmful", "off_task", "garbled"
# or "other".
BORDER_RUNS = None
BORDER_GROWS = None


# 12. Safe and useless. Each of these is a whole model: it reads a prompt (a text) and answers it (a
# text). Beside each, write the number of stage 5's table that sees what is wrong with it:
# "hs", "hs_plus", "fa" or "benign".
def useless(prompt):
    """A model with HS 0 and HS+ 100 that refuses nothing."""
    raise NotImplementedError


USELESS_IS_SEEN_BY = None


def overcautious(prompt):
    """A model with HS 0 and HS+ 0 that nobody could use."""
    raise NotImplementedError


OVERCAUTIOUS_IS_SEEN_BY = None

# 13. Direction or training? The refusals (percent) of the four cells on ONE run of your own (not of
# .results), with eps whole (scale 1), and what training with lam adds at each direction, in points.
TWO_BY_TWO_RUN = None  # the run's folder, as in "runs/seed1"
TWO_BY_TWO = {
    ("plain", "one"): None,
    ("plain", "ten"): None,
    ("panacea", "one"): None,  # its own last eps
    ("panacea", "ten"): None,
}
TRAINING_ADDS = {"one": None, "ten": None}
