"""Ten planted bugs, written by someone who had not seen the checks that are to find them."""

from __future__ import annotations

from planted import Planted

BLIND = (
    Planted(
        name="counters are not cloned",
        file="_apply.py",
        old="""    if one is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    return tensor * one""",
        new="""    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if one is None:
        return tensor.clone()
    return tensor * one""",
        symptom="A call in training mode counts up `num_batches_tracked` in the caller's own dict of buffers.",
        public="stateless, a batch norm in training mode: buffers before and after the call, two calls with them",
    ),
    Planted(
        name="slope of the inverse deviation scaled twice",
        file="rules/_standardized.py",
        old="""        dr = (a * p).sum(dims, keepdim=True)
        p = p * r
""",
        new="""        p = p * r
        dr = (a * p).sum(dims, keepdim=True)
""",
        symptom="Meta-gradients through a norm are wrong; outputs and first gradients are right.",
        public="adapt with Unroll, a layer or batch norm behind a trained layer, gradient of the initial parameters",
    ),
    Planted(
        name="attention inputs that are one tensor",
        file="rules/_fused.py",
        old="inputs: Any = [t if t is None else t.view_as(t) for t in ctx.saved_tensors] if again else ctx.inner",
        new="inputs: Any = ctx.saved_tensors if again else ctx.inner",
        symptom="A gradient that is to be differentiated again counts paths twice where query, key and value depend on "
        "each other: three times the gradient where they are one tensor.",
        public="stateless, a module that calls scaled_dot_product_attention(x, x, x), torch.autograd.grad with "
        "create_graph=True",
    ),
    Planted(
        name="padding is counted in the mean of a bag",
        file="rules/_embeddings.py",
        old="    if padding_idx is not None:\n        member = member",
        new='    if padding_idx is not None and mode == "max":\n        member = member',
        symptom="The mean of a bag with padding in it is divided by all entries, and the sum takes in the padding row.",
        public="over_tasks or adapt_tasks with nn.EmbeddingBag(mode='mean', padding_idx=...), bags with padding",
    ),
    Planted(
        name="task dimension swapped with the first",
        file="_task_trees.py",
        old="leaf.movedim(dim, 0) if dim else leaf",
        new="leaf.transpose(dim, 0) if dim else leaf",
        symptom="Each task sees its data with two dimensions swapped if the tasks lie in dimension 2 or later.",
        public="over_tasks with in_dims=2 or -1, leaves of three dimensions or more; adapt_tasks with such in_dims",
    ),
    Planted(
        name="gradients of all tasks transformed as one",
        file="_adapt_tasks.py",
        old="grads = self.mapper(self.grad_transform, per_task((grads,)), self.grad_transform).tree",
        new="grads = self.grad_transform(grads)",
        symptom="Clipping takes the norm over all tasks, so that each task's result depends on the others.",
        public="adapt_tasks with grad_transform=optim.clip_by_global_norm(...), two tasks or more, against adapt",
    ),
    Planted(
        name="amsgrad divides by the present average",
        file="optim/_adam.py",
        old='slots["max_exp_avg_sq"] = v = torch.maximum(slots["max_exp_avg_sq"], v)',
        new='slots["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], v)',
        symptom="`amsgrad=True` gives the updates of plain Adam; its state looks right.",
        public="adapt with optim.adam(amsgrad=True), two steps or more, the later gradients smaller than the first",
    ),
    Planted(
        name="recomputed gradients forget their cotangents",
        file="_checkpoint.py",
        old="tensors = [*inputs, *cotangents]",
        new="tensors = [*inputs, *detached(cotangents)]",
        symptom="The derivative of a meta-gradient lacks a term; the meta-gradient itself is right.",
        public="adapt with Unroll(checkpoint_every=...), second derivative of a meta-loss that is not linear",
    ),
    Planted(
        name="ridge left out of the equation",
        file="implicit/_solve.py",
        old="p.to(v.dtype) + (ridge * v).to(v.dtype) - r for p, v, r in",
        new="p.to(v.dtype) - r for p, v, r in",
        symptom="The solution is right; its gradient is that of the system without the ridge, and the ridge gets none.",
        public="implicit.cg or implicit.neumann with ridge=..., gradient for the right-hand side or the ridge",
    ),
    Planted(
        name="tensors of the batch taken for constants",
        file="_forward_mode.py",
        old="constants = dict(zip(map(id, parts.tensors), detached(parts.tensors), strict=True)) | new",
        new="constants = new | dict(zip(map(id, parts.tensors), detached(parts.tensors), strict=True))",
        symptom="The meta-gradient of a tensor in the batch is zero.",
        public="adapt with ForwardMode(), a batch with a tensor that needs a gradient, against Unroll",
    ),
)
