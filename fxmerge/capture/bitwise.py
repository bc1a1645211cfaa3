"""Conditions that a graph can compute."""

from __future__ import annotations

import ast
from functools import reduce


class Bitwise(ast.NodeTransformer):
    """Conditions with `&`, `|` and `^` in place of `and`, `or` and `not`, which a graph has no calls for."""

    @classmethod
    def of(cls, text: str) -> ast.Expression:
        found: ast.Expression = ast.fix_missing_locations(cls().visit(ast.parse(text, mode="eval")))
        return found

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        op = ast.BitOr() if isinstance(node.op, ast.Or) else ast.BitAnd()
        values: list[ast.expr] = [self.visit(value) for value in node.values]
        return reduce(lambda a, b: ast.BinOp(a, op, b), values)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.BinOp(operand, ast.BitXor(), ast.Constant(True))
        return ast.UnaryOp(node.op, operand)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        terms = [self.visit(value) for value in (node.left, *node.comparators)]
        pairs: list[ast.expr] = [
            ast.Compare(a, [op], [b]) for a, op, b in zip(terms, node.ops, terms[1:], strict=False)
        ]
        return reduce(lambda a, b: ast.BinOp(a, ast.BitAnd(), b), pairs)
