"""Your answers to the README's exercises. Each function says what it should return.

Replace `raise NotImplementedError` and run the exercise's check, for example

    pytest tests/test_exercises.py -k linf

An exercise that is not attempted yet is skipped. `w`, gradients and eps are lists of tensors; a
`loss` is a function from a batch to a scalar that depends on w, as in 04_panacea.py.
"""


def perturbation(grad_h, rho):
    """1. Eq. 2: rho * grad h / ||grad h||, one L2 norm over all tensors; new tensors."""
    raise NotImplementedError


def per_tensor_perturbation(grad_h, rho):
    """2. The same with one norm PER TENSOR: each tensor of eps gets norm rho / sqrt(n tensors)."""
    raise NotImplementedError


def panacea_rule(loss, w, batch, harmful, rho, lam):
    """3. Eq. 3: (gradient, eps, {"g", "h", "h_eps"}), w restored bit for bit."""
    raise NotImplementedError


def random_perturbation(grad_h, rho, generator):
    """4. Gaussian directions with the shapes of grad_h, scaled to one global L2 norm of rho."""
    raise NotImplementedError


def linf_perturbation(grad_h, rho):
    """5. The maximiser of the linearised h over the box max |eps_i| <= rho."""
    raise NotImplementedError


def multi_step_perturbation(loss, w, harmful, rho, steps):
    """6. `steps` steps of projected ascent on h inside ||eps|| <= rho; w is restored."""
    raise NotImplementedError


def anchored_direction(grad_h, grad_a, rho, mu):
    """7. One step of length rho that climbs h and descends mu * a, a the loss on refusals."""
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
