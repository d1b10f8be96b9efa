"""Planted bugs, by someone who knows the checks: mistakes that people have made in such code, or nearly made here."""

from __future__ import annotations

from planted import Planted

MODULES = (
    Planted(
        name="tied weights come apart",
        file="_skeleton.py",
        old="""                first.setdefault(id(tensor), (path, tensor, is_buffer))
                places.setdefault(id(tensor), []).append(Slot(path, is_buffer))
    params: dict""",
        new="""                first[path] = (path, tensor, is_buffer)
                places[path] = [Slot(path, is_buffer)]
    params: dict""",
        symptom="A tied weight is two parameters, and each gets a part of the gradient.",
        public="stateless, a module with tied weights",
        check="stateless",
    ),
    Planted(
        name="buffers that were written are not returned",
        file="_apply.py",
        old="given is not None and (inside or is_changed(own, given)):",
        new="given is not None and inside:",
        symptom="Running statistics never move in eager code.",
        public="stateless, a batch norm in training mode",
        check="stateless",
    ),
    Planted(
        name="statistics move in place, from task to task",
        file="_apply.py",
        old="        return tensor.clone()\n    return tensor * one.to(tensor.device, tensor.dtype)",
        new="        return tensor\n    return tensor * one.to(tensor.device, tensor.dtype)",
        symptom="A call moves the statistics in the caller's dict, so that the next task begins where this one ended.",
        public="stateless, over_tasks in a loop, a batch norm in training mode",
        check="stateless",
    ),
    Planted(
        name="threads share a skeleton",
        file="_skeleton.py",
        old="skeleton = self._idle.pop()  # atomic: no lock is needed",
        new="skeleton = self._idle[-1]",
        symptom="Calls from several threads, and re-entrant ones, take each other's weights.",
        public="stateless, calls from threads",
        check="stateless",
    ),
    Planted(
        name="train and eval switch the mode of all applies",
        file="_apply.py",
        old="template = self._skeletons.copy()\n        template.train(mode)",
        new="template = self._skeletons.template\n        template.train(mode)",
        symptom="`apply.eval()` makes `apply.train()` evaluate too.",
        public="apply.train() and apply.eval() of one module with dropout or a batch norm",
        check="stateless",
    ),
    Planted(
        name="attention keeps its first projection",
        file="rules/_attention.py",
        old="""    if not transforming():
        return _forward_alone(self, *args, **kwargs)
""",
        new="""    if not transforming():
        self.__dict__["in_proj_weight"] = self.__dict__.setdefault("_packed", self.in_proj_weight)
        return _forward_alone(self, *args, **kwargs)
""",
        symptom="Later calls with other weights use the first call's projection, and give the new one no gradient.",
        public="stateless, nn.MultiheadAttention or a transformer layer, two calls with different weights",
        check="stateless",
    ),
    Planted(
        name="the slope of the norm loses what the scale's gradient depends on",
        file="rules/_standardized.py",
        old="dy = -turned if dy is None else dy - turned",
        new="dy = -turned",
        symptom="Second derivatives between the scale of a norm and what comes before it lack a term.",
        public="stateless or adapt with Unroll, a layer or batch norm with a scale, second derivatives",
        check="meta_grads",
    ),
    Planted(
        name="one gradient of attention for another",
        file="rules/_fused.py",
        old="        by_index = dict(zip(wanted, found, strict=True))",
        new="        by_index = dict(enumerate(found))",
        symptom="Where the query needs no gradient, the keys get none, and the values get that of the keys.",
        public="scaled_dot_product_attention of a constant and learned tensors",
        check="module_grads",
    ),
)

TASKS = (
    Planted(
        name="tasks share their dropout masks",
        file="_vmapped.py",
        old="level = _vmap_increment_nesting(tasks, randomness)",
        new='level = _vmap_increment_nesting(tasks, "same")',
        symptom="All tasks draw the same numbers, whatever `randomness` says.",
        public='over_tasks or adapt_tasks with dropout, randomness="different"',
        check="over_tasks",
    ),
    Planted(
        name="momentum of running statistics the other way round",
        file="rules/_norms.py",
        old="running.copy_((1 - momentum) * running + momentum * value.detach())",
        new="running.copy_(momentum * running + (1 - momentum) * value.detach())",
        symptom="Inside transforms running statistics forget at 0.9 what they should keep at 0.9.",
        public="over_tasks or adapt_tasks with a batch norm in training mode, buffers returned",
        check="over_tasks",
    ),
    Planted(
        name="running variance is the biased one",
        file="rules/_norms.py",
        old="_track(running_var, var.flatten() * (count / (count - 1)), momentum)",
        new="_track(running_var, var.flatten(), momentum)",
        symptom="Inside transforms running variances come out too small.",
        public="over_tasks or adapt_tasks with a batch norm in training mode, buffers returned",
        check="over_tasks",
    ),
    Planted(
        name="each chunk begins with the last task of the one before",
        file="_budget.py",
        old="        start += size\n    return results",
        new="        start += size - 1\n    return results",
        symptom="With `chunk_size` tasks get results of their neighbours.",
        public="over_tasks or adapt_tasks with chunk_size of two or more, more than one chunk",
        check="over_tasks",
    ),
    Planted(
        name="padding learns",
        file="rules/_embeddings.py",
        old="out = torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), out.detach(), out)",
        new="out = torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), out.clone(), out)",
        symptom="Inside transforms the padding row of an embedding gets a gradient.",
        public="over_tasks or adapt_tasks with nn.Embedding(padding_idx=...), gradients",
        check="over_tasks",
    ),
    Planted(
        name="variances of the likelihood are detached",
        file="rules/_losses.py",
        old="losses = 0.5 * (torch.log(var) + (input - target) ** 2 / var)",
        new="losses = 0.5 * (torch.log(var.detach()) + (input - target) ** 2 / var)",
        symptom="Inside transforms `gaussian_nll_loss` has a wrong gradient by the variances.",
        public="over_tasks or adapt_tasks with F.gaussian_nll_loss, gradient by the variances",
        check="over_tasks",
    ),
    Planted(
        name="losses are (steps, tasks)",
        file="_adapt_tasks.py",
        old="values = torch.stack(tuple(losses), 1) if losses",
        new="values = torch.stack(tuple(losses)) if losses",
        symptom="`adapted.losses` has its two dimensions swapped.",
        public="adapt_tasks, losses",
        check="adapt_many",
    ),
    Planted(
        name="schedules of many tasks are a step late",
        file="_adapt_tasks.py",
        old="at_step(state.hyperparameters[name], state.step) for name",
        new="at_step(state.hyperparameters[name], (state.step - 1).clamp(min=0)) for name",
        symptom="`adapt_tasks` takes the rate of the step before.",
        public="adapt_tasks with a callable of the step as lr, two steps or more",
        check="adapt_many",
    ),
    Planted(
        name="steps are counted in float32",
        file="optim/_arithmetic.py",
        old="        exponent = exponent.to(torch.float64)",
        new="        exponent = exponent.to(torch.float32)",
        symptom="Inside transforms, and with learned betas, Adam's bias corrections are right to seven digits only.",
        public="optim.adam with a tensor for betas, and over_tasks of a function that calls adapt",
        check="optimizer",
    ),
    Planted(
        name="inner gradients are constants inside transforms",
        file="_gradient.py",
        old="    if differentiable:\n        return values, aux, grads",
        new="    if differentiable:\n        return values, aux, tree_detach(grads)",
        symptom="`torch.func.grad` through `adapt`, and `over_tasks` of it, give the first-order meta-gradient.",
        public="over_tasks of a function that calls adapt, meta-gradients",
        check="adapt_many",
    ),
)

LOOPS = (
    Planted(
        name="create_graph is missing",
        file="_gradient.py",
        old="found = gradients_of(total, inputs, create, aux_needs_graph)",
        new="found = gradients_of(total, inputs, False, True)",
        symptom="`Unroll()` gives the first-order meta-gradient.",
        public="adapt with Unroll, meta-gradients",
        check="meta_grads",
    ),
    Planted(
        name="a slot of Adam is detached",
        file="optim/_adam.py",
        old='slots = {**slots, "exp_avg": m, "exp_avg_sq": v}',
        new='slots = {**slots, "exp_avg": m, "exp_avg_sq": v.detach()}',
        symptom="Meta-gradients through two steps or more of Adam lack what goes by the second moment.",
        public="adapt with optim.adam, two steps or more",
        check="optimizer",
    ),
    Planted(
        name="the first momentum buffer is detached",
        file="optim/_sgd.py",
        old="""        slots = {"momentum_buffer": buffers}
        gs = _added""",
        new="""        first = not any(bool(k.any()) for k in kept)
        slots = {"momentum_buffer": [b.detach() if first else b for b in buffers]}
        gs = _added""",
        symptom="What torch.optim.SGD(differentiable=True) does: the first gradient is lost to all later steps.",
        public="adapt with optim.sgd and momentum, two steps or more",
        check="optimizer",
    ),
    Planted(
        name="bias corrections do not see their betas",
        file="optim/_arithmetic.py",
        old="        base = base.to(torch.float64)",
        new="        base = base.detach().to(torch.float64)",
        symptom="Meta-gradients by the betas of Adam lack a part.",
        public="adapt with optim.adam and learned betas",
        check="optimizer",
    ),
    Planted(
        name="the factor of clipping is a constant",
        file="optim/_clip.py",
        old="factor = torch.where(above, limit / torch.where(above, norm, 1.0), 1.0)",
        new="factor = torch.where(above, limit / torch.where(above, norm.detach(), 1.0), 1.0)",
        symptom="Meta-gradients through clipped gradients are wrong.",
        public="adapt with grad_transform=optim.clip_by_global_norm(...)",
        check="meta_grads",
    ),
    Planted(
        name="infinite slope of a root",
        file="optim/_arithmetic.py",
        old="    info = torch.finfo(x.dtype)\n",
        new="    return x.sqrt()\n    info = torch.finfo(x.dtype)\n",
        symptom="What torch's Adam does: a meta-gradient is NaN where an inner gradient is zero.",
        public="adapt with optim.adam, a parameter that the loss does not reach",
        check="meta_grads",
    ),
    Planted(
        name="recomputed steps lose closed-over tensors",
        file="_checkpoint.py",
        old="*(t for batch in batches for t in batch.tensors), *values.captures.found.values()]",
        new="*(t for batch in batches for t in batch.tensors)]",
        symptom="What a recomputing autograd.Function does: a learned loss gets no gradient, without an error.",
        public="adapt with Unroll(checkpoint_every=...), a loss that closes over a tensor",
        check="modes",
    ),
    Planted(
        name="recomputed steps draw other dropout masks",
        file="_checkpoint.py",
        old="""                with nullcontext() if random is None else drawn_from(random):
                    state, value = self.step(state, of(batch), True)
                values.append(value)
        found = split(state).tensors
        results = [*(found[place] for place in self.positions), *values]
        if not transforming():
            if not self.reads and replaced.stray(results, tensors) is not None:
                self.reads = True  # or the step makes leaves, which only the mode can tell from what it reads
                return self(tensors)
            replaced.check(results, tensors)
        same_tree = len(found) == len(self.begin.tensors)
        start = [new[id(self.begin.tensors[place])] if same_tree else None for place in self.positions]
        check_repeats(self.results, results, [*start, *[None] * len(values)], "leave `checkpoint_every` out")
""",
        new="""                with nullcontext():
                    state, value = self.step(state, of(batch), True)
                values.append(value)
        found = split(state).tensors
        results = [*(found[place] for place in self.positions), *values]
        if not transforming():
            if not self.reads and replaced.stray(results, tensors) is not None:
                self.reads = True
                return self(tensors)
            replaced.check(results, tensors)
""",
        symptom="Meta-gradients of a loss with dropout are those of another loss.",
        public="adapt with Unroll(checkpoint_every=...), a loss that draws random numbers",
        check="modes",
    ),
    Planted(
        name="the last block of steps is a whole one",
        file="_unroll.py",
        old="indices = range(start, min(start + every, steps))",
        new="indices = range(start, start + every)",
        symptom="Where `checkpoint_every` does not divide the steps, too many are taken.",
        public="adapt with Unroll(checkpoint_every=2), three steps",
        check="modes",
    ),
    Planted(
        name="truncation cuts the identity path",
        file="_unroll.py",
        old="last._replace(params=params.joined([new + (old - old.detach()) for old, new in pairs])),",
        new="last._replace(params=params.joined([new for old, new in pairs])),",
        symptom="Initial parameters get no gradient from a truncated loop.",
        public="adapt with Unroll(truncate=...), gradient of the initial parameters",
        check="modes",
    ),
    Planted(
        name="truncation keeps a step too many",
        file="_unroll.py",
        old="first = steps - self.truncate if self.truncate is not None and recording else 0",
        new="first = max(steps - self.truncate - 1, 0) if self.truncate is not None and recording else 0",
        symptom="`truncate=k` differentiates through k + 1 steps.",
        public="adapt with Unroll(truncate=...), fewer than all steps",
        check="modes",
    ),
    Planted(
        name="first order with the Hessian",
        file="_unroll.py",
        old="return unrolled(loop, state, range(steps), False)",
        new="return unrolled(loop, state, range(steps), True)",
        symptom="`FirstOrder()` is `Unroll()`.",
        public="adapt with FirstOrder",
        check="modes",
    ),
    Planted(
        name="sign of the implicit derivative",
        file="implicit/_pullback.py",
        old="grads = iter(pull([-tensor for tensor in found]))",
        new="grads = iter(pull(list(found)))",
        symptom="Implicit meta-gradients point the other way.",
        public="adapt with Implicit, implicit.custom_root",
        check="modes",
    ),
    Planted(
        name="implicit derivatives lose closed-over tensors",
        file="implicit/_pullback.py",
        old="known = [*inputs, *captures.found.values()]",
        new="known = [*inputs]",
        symptom="What the loss closes over gets no implicit gradient.",
        public="adapt with Implicit, a loss that closes over a tensor",
        check="modes",
    ),
    Planted(
        name="forward mode begins with nothing",
        file="_forward_mode.py",
        old="        if not self._begin:\n",
        new="        if self._begin is not None:\n",
        symptom="Initial parameters get no gradient in `ForwardMode()`.",
        public="adapt with ForwardMode, gradient of the initial parameters",
        check="modes",
    ),
    Planted(
        name="the solve has no derivative of its own",
        file="implicit/_pullback.py",
        old="found = attach(found, [*tensors, *cotangents], self._transposed(), keep_outputs=True)",
        new="found = list(found)",
        symptom="Second derivatives of roots and solves lack a term.",
        public="implicit.custom_root, second derivative",
        check="solves",
    ),
    Planted(
        name="a Neumann series without its first term",
        file="implicit/_solve.py",
        old="""        x = x + step * residual
        residual = residual - step * system.product(residual)""",
        new="""        residual = residual - step * system.product(residual)
        x = x + step * residual""",
        symptom="`implicit.neumann` returns a wrong solution, and says that it has converged.",
        public="implicit.neumann",
        check="solves",
    ),
)
