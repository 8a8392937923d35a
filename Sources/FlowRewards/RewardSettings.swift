/// One entry of a configuration's `rewards`: which function of an image, how it counts, and what it is made of.
///
/// Keys that only some rewards read are nil or empty where they are not given; ``RewardFactory/make(_:assets:)`` refuses
/// those that the named reward does not read.
public struct RewardSettings: Codable, Sendable, Equatable {
  /// What is scored, one of ``RewardFactory/names``.
  public var name: String
  /// What metrics and other rewards call it; nil for the name, with the score where two entries share a name.
  public var label: String?
  /// Which of the reward's scores is meant; nil is the reward's own choice.
  public var score: String?
  /// Factor of this reward in the aggregate. 0: scored on every sample, but not trained on.
  public var weight: Double
  /// Factor in chunks that begin below `chunk.lateBelow`; nil for ``weight`` in all chunks.
  public var lateWeight: Double?
  /// Scores from here up count as 1, others as 0; nil takes scores as they are.
  public var threshold: Double?
  /// When this reward counts at all.
  public var gate = Gate()
  /// Only watched: scored on evaluation images, never on samples, so that it cannot be trained on.
  public var watch = false
  /// What happens when it fails.
  public var failure = Failure()

  /// Model folder or file, of rewards that are networks; of `judge` the model's name on the server.
  public var model: String?
  /// Weights on top of the model, of `aesthetic`.
  public var head: String?
  /// Quality of the JPEG, 1 … 100, of `jpeg-size`.
  public var quality: Int?
  /// Language data, of `ocr`.
  public var language: String?
  /// Program and arguments, of `command`.
  public var command: [String] = []
  /// Address of the server, of `http`, `judge` and `pickle`.
  public var url: String?
  /// Images of one request; nil is the reward's own choice.
  public var batch: Int?
  /// Requests under way at once, or processes of a `command`; nil is the reward's own choice.
  public var concurrency: Int?
  /// Environment variable that holds the bearer token; nil sends none.
  public var tokenVariable: String?
  /// What `judge` asks; `{prompt}` stands for the image's prompt.
  public var template: String?
  /// Regular expression whose first group is the score in `judge`'s answer.
  public var pattern: String?
  /// What the number that ``pattern`` finds is divided by.
  public var scale: Double?

  /// Creates an entry with every other key at its default.
  public init(name: String, score: String? = nil, weight: Double = 1) {
    (self.name, self.score, self.weight) = (name, score, weight)
  }
  /// The base on which an entry of a file is read: without a name, which no reward has.
  public init() { self.init(name: "") }

  /// When a reward counts.
  public struct Gate: Codable, Sendable, Equatable {
    /// Label of another reward; nil: always.
    public var reward: String?
    /// The other reward must be above this; else this one is 0 for the sample.
    public var above = 0.0
    /// Always.
    public init() {}
  }

  /// What happens when a reward fails: it is asked again, then its sample is masked out of its group, and if too many
  /// fail the run stops. A failed reward is never a number.
  public struct Failure: Codable, Sendable, Equatable {
    /// Seconds for one request, connection and answer; of `command` for one image.
    public var timeout = 60.0
    /// How often a request that failed is repeated.
    public var retries = 3
    /// Share of an iteration's samples without a score above which the run stops, resumably.
    public var abortAbove = 0.5
    /// Whether equal scores of the two images of the start-up probe are a warning only: for detectors, which may see
    /// nothing in a drawing.
    public var allowTie = false
    /// Every default.
    public init() {}
  }
}

extension RewardSettings {
  /// Keys that say what a reward is made of: every reward reads a few of them.
  public enum Ingredient: String, Sendable, CaseIterable {
    case score, model, head, quality, language, command, url, batch, concurrency, tokenVariable, template,
      pattern,
      scale
  }

  /// Those that are given.
  public var ingredients: [Ingredient] {
    Ingredient.allCases.filter { key in
      switch key {
      case .score: score != nil
      case .model: model != nil
      case .head: head != nil
      case .quality: quality != nil
      case .language: language != nil
      case .command: !command.isEmpty
      case .url: url != nil
      case .batch: batch != nil
      case .concurrency: concurrency != nil
      case .tokenVariable: tokenVariable != nil
      case .template: template != nil
      case .pattern: pattern != nil
      case .scale: scale != nil
      }
    }
  }
}
