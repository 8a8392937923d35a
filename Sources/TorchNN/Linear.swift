import Torch

/// Low-rank update of a linear layer, `y += scale · (x·Aᵀ)·Bᵀ`.
///
/// Source: LoRA, arXiv 2106.09685, eq. 3; `scale = alpha / rank` as in PEFT.
public final class LoRA {
  /// A [rank, in], float32 gradient leaf.
  public let down: Tensor
  /// B [out, rank], float32 gradient leaf; zero at the start, so that the layer begins as its base.
  public let up: Tensor
  /// alpha / rank.
  public let scale: Double
  /// Columns of A's product.
  public var rank: Int { down.size(0) }

  /// Wraps existing factors.
  public init(down: Tensor, up: Tensor, scale: Double) {
    self.down = down
    self.up = up
    self.scale = scale
  }
}

/// `x·Wᵀ + b`, with an optional low-rank adapter.
public final class Linear {
  /// W [out, in].
  public let weight: Parameter
  /// b [out].
  public let bias: Parameter?
  /// The adapter, if one is attached.
  public var adapter: LoRA?
  /// The checkpoint key without `.weight`: what adapters are named by.
  public let path: String
  /// Sizes of the last dimension before and after.
  public let inSize, outSize: Int
  private let prepared = PreparedProduct()

  /// Takes `weight` and, where `bias` says so, `bias` under `path`.
  public convenience init(
    _ inSize: Int, _ outSize: Int, bias: Bool = true, _ path: ParameterPath, _ registry: ModuleRegistry
  ) throws {
    try self.init(inSize, outSize, names: ("weight", bias ? "bias" : nil), path, registry)
  }

  /// Takes weight and bias under names of their own, as `in_proj_weight`; adapters are named by `path`.
  public init(
    _ inSize: Int, _ outSize: Int, names: (weight: String, bias: String?), _ path: ParameterPath,
    _ registry: ModuleRegistry
  ) throws {
    self.inSize = inSize
    self.outSize = outSize
    self.path = path.prefix
    weight = try path.parameter(names.weight, outSize, inSize)
    bias = try names.bias.map { try path.parameter($0, outSize) }
    if let kind = path.checkpoint.quantised(path.prefix) { try weight.quantise(kind) }
    registry.add(self)
  }

  /// [..., in] → [..., out].
  public func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try LinearGroup([self], prepared: prepared)(x)
  }
}

/// What is made of tensors, kept while they stay as they are.
final class Prepared<Form> {
  private var kept: (form: Form, sources: [Tensor], versions: [Int], dtype: DType)?

  /// The form made of `sources` for products in `dtype`: the kept one while they are the same tensors unchanged.
  func form(
    _ sources: [Tensor], _ dtype: DType, _ make: () throws(TorchError) -> Form
  ) throws(TorchError) -> Form {
    // A change in place gives a tensor a new version.
    let versions = sources.map(\.version)
    if let kept, kept.versions == versions, kept.dtype == dtype,
      zip(kept.sources, sources).allSatisfy({ $0 === $1 })
    {
      return kept.form
    }
    kept = nil
    let form = try make()
    kept = (form, sources, versions, dtype)
    return form
  }

  func forget() { kept = nil }
}

/// Operands of a product with frozen weights.
private enum ProductForm {
  case plain
  case adapted(down: Tensor, up: Tensor)
  case packed(Tensor.PackedLinear)
}
private typealias PreparedProduct = Prepared<ProductForm>

/// Linear layers with one input, evaluated as one matrix product.
public final class LinearGroup {
  private let members: [Linear]
  private typealias Weights = (weight: Tensor, scales: Tensor?, bias: Tensor?)
  private var stacked: Weights?
  private let prepared: PreparedProduct

  /// Largest weight of a stack: 256 MiB, twice that of a FLUX.1 block's projections in bfloat16.
  private static let most = 1 << 28
  private var bytes: Int {
    members.reduce(0) { $0 + $1.inSize * $1.outSize * $1.weight.tensor.dtype.size }
  }

  /// Whether a frozen layer is laid out anew for the processor's matrix units, twice: for forward and backward passes.
  ///
  /// Wide layers gain nothing from that.
  public static func packs(inSize: Int, _ dtype: DType, _ device: Device) -> Bool {
    dtype == .bfloat16 && device == .cpu && inSize <= 1024 && Tensor.fusesAttention(.bfloat16)
  }

  /// Joins `members`, which must all have a bias or all have none.
  public convenience init(_ members: [Linear]) { self.init(members, prepared: PreparedProduct()) }
  fileprivate init(_ members: [Linear], prepared: PreparedProduct) {
    (self.members, self.prepared) = (members, prepared)
  }

  /// [..., in] → [..., Σ out], the members' outputs side by side.
  public func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    // Stacking holds a group's weights twice for a moment, and one product gains little where each is large.
    if members.count > 1, bytes > Self.most {
      var parts: [Tensor] = []
      for member in members { parts.append(try member(x)) }
      return try Tensor.cat(parts, -1)
    }
    let adapters = adapters()
    if adapters.isEmpty, let packed = try packedLeaves(x) {
      return try x.linear(packed, trained: members.map { ($0.weight.tensor, $0.bias?.tensor) })
    }
    let (weight, scales, bias) = try weights()
    if let scales {
      let base = try x.quantisedLinear(weight, scales, bias)
      return adapters.isEmpty ? base : try addAdapters(to: base, x)
    }
    if weight.requiresGrad || bias?.requiresGrad == true {
      let base = try x.linear(weight, bias)
      return adapters.isEmpty ? base : try addAdapters(to: base, x)
    }
    switch try prepare(adapters, weight, bias, x) {
    case .plain: return try x.linear(weight, bias)
    case .adapted(let down, let up):
      return try x.adaptedLinear(weight, bias, down: down, up: up, adapters)
    case .packed(let packed): return try x.linear(packed, adapters)
    }
  }

  private func adapters() -> [Tensor.Adapter] {
    var start = 0
    return members.compactMap { member in
      defer { start += member.outSize }
      return member.adapter.map { .init(down: $0.down, up: $0.up, scale: $0.scale, start: start) }
    }
  }

  /// The layout of trained layers' values in x's dtype, made anew only when an optimizer step has changed them; nil where
  /// layers are not packed or not all of them trained.
  private func packedLeaves(_ x: Tensor) throws(TorchError) -> Tensor.PackedLinear? {
    let biases = members.compactMap { $0.bias?.tensor }
    let sources = members.map(\.weight.tensor) + biases
    guard sources.allSatisfy({ $0.requiresGrad && $0.dtype == .float32 }),
      biases.isEmpty || biases.count == members.count,
      Self.packs(inSize: members[0].inSize, x.dtype, x.device), members[0].inSize % 2 == 0,
      members.reduce(0, { $0 + $1.outSize }) % 2 == 0
    else { return nil }
    let form = try prepared.form(sources, x.dtype) { () throws(TorchError) in
      try withoutGrad { () throws(TorchError) in
        let bias = biases.isEmpty ? nil : try Tensor.cat(biases).to(x.dtype)
        let weight = try Tensor.cat(members.map(\.weight.tensor)).to(x.dtype)
        return .packed(try weight.packedLinear(bias, down: nil, up: nil))
      }
    }
    guard case .packed(let packed) = form else { return nil }
    return packed
  }

  /// What frozen layers multiply by, made anew only when an optimizer step has changed the adapters.
  private func prepare(
    _ adapters: [Tensor.Adapter], _ weight: Tensor, _ bias: Tensor?, _ x: Tensor
  ) throws(TorchError) -> ProductForm {
    try prepared.form([weight] + adapters.flatMap { [$0.down, $0.up] }, x.dtype) { () throws(TorchError) in
      try withoutGrad { () throws(TorchError) in
        let factors = adapters.isEmpty ? nil : try joined(x)
        let sizes = [weight.size(0), weight.size(1), factors?.down.size(0) ?? 0]
        guard
          weight.dtype == x.dtype, Self.packs(inSize: sizes[1], x.dtype, x.device),
          sizes.allSatisfy({ $0 % 2 == 0 })
        else { return factors.map { .adapted(down: $0.down, up: $0.up) } ?? .plain }
        return .packed(try weight.packedLinear(bias, down: factors?.down, up: factors?.up))
      }
    }
  }

  /// The adapters' factors side by side in x's dtype, B's scaled and each in its own rows and columns.
  private func joined(_ x: Tensor) throws(TorchError) -> (down: Tensor, up: Tensor) {
    var (downs, ups): ([Tensor], [Tensor]) = ([], [])
    let ranks = members.map { $0.adapter?.rank ?? 0 }
    let total = ranks.reduce(0, +)
    var before = 0
    for (member, rank) in zip(members, ranks) {
      if let adapter = member.adapter {
        downs.append(adapter.down)
        // The scale rides on B, which is small.
        let up = adapter.scale == 1 ? adapter.up : try adapter.up * adapter.scale
        ups.append(rank == total ? up : try up.pad([before, total - before - rank]))
      } else {
        ups.append(try Tensor.zeros([member.outSize, total], device: x.device))
      }
      before += rank
    }
    let down = downs.count == 1 ? downs[0] : try Tensor.cat(downs)
    let up = ups.count == 1 ? ups[0] : try Tensor.cat(ups)
    return (try down.to(x.dtype), try up.to(x.dtype))
  }

  /// Stored values of quantised layers, else the values computed with.
  private func weights() throws(TorchError) -> Weights {
    if let stacked { return stacked }
    let quantised = members[0].weight.scales != nil
    guard members.allSatisfy({ ($0.weight.scales != nil) == quantised }) else {
      throw TorchError(
        "linear", "\(members.map(\.path).joined(separator: ", ")) are one product: quantise all or none")
    }
    func stored(_ weight: Parameter) throws(TorchError) -> Tensor {
      quantised ? weight.tensor : try weight.value()
    }
    if members.count == 1 {
      return (try stored(members[0].weight), members[0].weight.scales, try members[0].bias?.value())
    }
    var parts: [Tensor] = []
    var biases: [Tensor] = []
    var frozen = true
    for member in members {
      parts.append(try stored(member.weight))
      if let bias = try member.bias?.value() { biases.append(bias) }
      frozen = frozen && !member.weight.tensor.requiresGrad
    }
    let weight = try Tensor.cat(parts)
    let scales = quantised ? try Tensor.cat(members.map { $0.weight.scales! }) : nil
    let bias = biases.isEmpty ? nil : try Tensor.cat(biases)
    guard frozen else { return (weight, scales, bias) }
    stacked = (weight, scales, bias)
    // The members become views of the stack: frozen weights are held once.
    var start = 0
    for member in members {
      member.weight.replace(
        by: try weight.narrow(0, start, member.outSize), scales: try scales?.narrow(0, start, member.outSize))
      if let bias { member.bias?.replace(by: try bias.narrow(0, start, member.outSize)) }
      start += member.outSize
    }
    return (weight, scales, bias)
  }

  /// Adds every adapter of a trained or quantised base, with two products: x·[A₁ A₂ …]ᵀ, then a block-diagonal B.
  private func addAdapters(to base: Tensor, _ x: Tensor) throws(TorchError) -> Tensor {
    let (down, up) = try joined(x)
    let rows = try x.reshape(-1, members[0].inSize)
    let hidden = try rows.linear(down)
    let outSize = members.reduce(0) { $0 + $1.outSize }
    return try base.reshape(-1, outSize).addmm(hidden, try up.transpose(0, 1)).reshape(base.shape)
  }

  /// Forgets the stacked weights, after a member was made trainable or changed dtype.
  public func unstack() {
    stacked = nil
    prepared.forget()
  }
}

/// How a frozen weight is kept in one byte a value, with one float32 scale a row.
public enum QuantisedWeight: String, Sendable, CaseIterable {
  /// Integers −127 … 127.
  case int8
  /// Floating point with 4 bits of exponent and 3 of fraction (e4m3).
  case fp8

  var dtype: DType { self == .int8 ? .int8 : .float8 }
}

/// The layers and parameters of a model by checkpoint key, collected while it is built.
public final class ModuleRegistry {
  /// Linear layers by key, without `.weight`.
  public private(set) var linears: [String: Linear] = [:]
  /// All parameters in order of construction.
  public private(set) var parameters: [Parameter] = []
  private var groups: [LinearGroup] = []
  private var constants: Set<String> = []

  /// An empty registry.
  public init() {}

  func add(_ linear: Linear) {
    linears[linear.path] = linear
    parameters += [linear.weight] + (linear.bias.map { [$0] } ?? [])
  }
  /// Records a parameter that is not part of a ``Linear``.
  public func add(_ parameter: Parameter) -> Parameter {
    parameters.append(parameter)
    return parameter
  }
  /// Records a tensor of the checkpoint that is never trained, such as a position table.
  public func add(constant parameter: Parameter) -> Parameter {
    constants.insert(parameter.key)
    return add(parameter)
  }
  /// Whether training all weights would train this one.
  public func isTrainable(_ parameter: Parameter) -> Bool { !constants.contains(parameter.key) }
  /// Joins layers into a group that follows changes of its members.
  public func group(_ members: [Linear]) -> LinearGroup {
    let group = LinearGroup(members)
    groups.append(group)
    return group
  }

  /// Moves all parameters to `dtype` and `device`.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    for parameter in parameters { try parameter.place(dtype, device) }
    for group in groups { group.unstack() }
  }
  /// Keeps the weights of the linear layers chosen by path in one byte a value; biases stay as they are.
  ///
  /// The layers go on computing in their dtype, by weights that are restored for each product: in training
  /// too they hold one byte a value. Layers of one ``LinearGroup`` must be chosen together.
  ///
  /// - Returns: number of weights quantised.
  /// - Throws: ``TorchError`` for a weight that is trained.
  @discardableResult
  public func quantise(_ kind: QuantisedWeight, where chosen: (String) -> Bool) throws(TorchError) -> Int {
    // Stacks would keep the old weights alive while the new ones are made.
    for group in groups { group.unstack() }
    var count = 0
    for (path, linear) in linears where chosen(path) {
      try linear.weight.quantise(kind)
      count += linear.weight.tensor.count
    }
    return count
  }
  /// Makes every parameter but the constants a float32 gradient leaf.
  public func makeTrainable() throws(TorchError) {
    for parameter in parameters where isTrainable(parameter) { try parameter.makeTrainable() }
    for group in groups { group.unstack() }
  }
}
